//! A container's configuration for an OCI runtime, from its image's.
//!
//! Sources: OCI runtime specification 1.2 (config.md, config-linux.md); OCI image specification 1.1
//! (conversion.md) for what becomes of an image's config.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use harbour_image::manifest::config::RunConfig;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroupBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, Mount, MountBuilder,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder, get_default_mounts,
};

use super::user::User;

/// Where programs are looked for when the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What root may do inside: the engines' usual choice.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Files of this host that a container on its network needs.
const NAMES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// What is wanted beside, or in place of, what the image says.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The command, after the image's entrypoint; the image's own when empty.
    pub command: Vec<String>,
    /// In place of the image's entrypoint, whose command is left out then.
    pub entrypoint: Option<String>,
    /// `NAME=value`, in place of the image's of the same name.
    pub env: Vec<String>,
    /// Where it starts.
    pub dir: Option<String>,
    /// Directories and files of this host.
    pub volumes: Vec<Volume>,
    /// Nothing of the root can be written.
    pub read_only: bool,
    /// A terminal of its own.
    pub terminal: bool,
    /// A network of its own, with nothing but a loopback interface, in place of the host's.
    pub no_network: bool,
    /// Its name for itself.
    pub hostname: String,
    /// In a user namespace: without what only the host's root may give.
    pub rootless: bool,
}

/// A directory or file of this host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On this host.
    pub source: PathBuf,
    /// In the container.
    pub target: PathBuf,
    /// The container cannot write to it.
    pub read_only: bool,
}

impl std::str::FromStr for Volume {
    type Err = String;

    /// `SOURCE:TARGET` or `SOURCE:TARGET:ro`, both absolute.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not /SOURCE:/TARGET or /SOURCE:/TARGET:ro");
        let mut parts = text.split(':');
        let (Some(source), Some(target)) = (parts.next(), parts.next()) else {
            return Err(wrong());
        };
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return Err(wrong()),
        };
        let absolute = source.starts_with('/') && target.starts_with('/');
        if !absolute || parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self {
            source: source.into(),
            target: target.into(),
            read_only,
        })
    }
}

/// The configuration of a container whose root is `rootfs` beside it.
///
/// # Errors
/// No command to run, or a directory that is not absolute.
pub fn spec(config: &RunConfig, user: &User, wanted: &Wanted) -> anyhow::Result<Spec> {
    let process = ProcessBuilder::default()
        .terminal(wanted.terminal)
        .user(
            UserBuilder::default()
                .uid(user.uid)
                .gid(user.gid)
                .additional_gids(match wanted.rootless {
                    // Nobody may set groups there.
                    true => Vec::new(),
                    false => user.groups.clone(),
                })
                .build()?,
        )
        .args(command(config, wanted)?)
        .env(env(config, user, wanted))
        .cwd(directory(config, wanted)?)
        .capabilities(capabilities(user)?)
        .no_new_privileges(false)
        .rlimits(Vec::new())
        .build()?;
    let root = RootBuilder::default()
        .path("rootfs")
        .readonly(wanted.read_only)
        .build()?;
    let mut mounts = get_default_mounts();
    if wanted.rootless {
        mounts = lesser(mounts, wanted)?;
    }
    if !wanted.no_network {
        for name in NAMES.map(Path::new) {
            if name.exists() {
                mounts.push(bind(name, name, true)?);
            }
        }
    }
    for volume in &wanted.volumes {
        mounts.push(bind(&volume.source, &volume.target, volume.read_only)?);
    }
    Ok(SpecBuilder::default()
        .version("1.0.2")
        .process(process)
        .root(root)
        .hostname(wanted.hostname.clone())
        .mounts(mounts)
        .linux(linux(wanted)?)
        .build()?)
}

/// The usual mounts without those that a user namespace cannot have: cgroups, a terminals' group that does
/// not exist there, and a view of devices of a network that is the host's, which is shown as it is. Where
/// programs expect to write is memory.
fn lesser(mounts: Vec<Mount>, wanted: &Wanted) -> anyhow::Result<Vec<Mount>> {
    let mut lesser = Vec::new();
    for mut mount in mounts {
        let kind = mount.typ().clone().unwrap_or_default();
        match kind.as_str() {
            "cgroup" => continue,
            "sysfs" if !wanted.no_network => {
                lesser.push(bind(Path::new("/sys"), Path::new("/sys"), true)?);
                continue;
            }
            "devpts" => {
                let options = mount.options().clone().unwrap_or_default().into_iter();
                let options = options.filter(|option| !option.starts_with("gid="));
                mount.set_options(Some(options.collect()));
            }
            _ => {}
        }
        lesser.push(mount);
    }
    // What the image has there is nobody's, and cannot be written.
    for dir in ["/tmp", "/var/tmp"] {
        let options = ["nosuid", "nodev", "mode=1777"].map(str::to_owned);
        lesser.push(
            MountBuilder::default()
                .destination(dir)
                .typ("tmpfs")
                .source("tmpfs")
                .options(options.to_vec())
                .build()?,
        );
    }
    Ok(lesser)
}

fn command(config: &RunConfig, wanted: &Wanted) -> anyhow::Result<Vec<String>> {
    let mut words = match &wanted.entrypoint {
        Some(entrypoint) => vec![entrypoint.clone()],
        None => config.entrypoint.clone(),
    };
    if wanted.command.is_empty() && wanted.entrypoint.is_none() {
        words.extend(config.cmd.iter().cloned());
    } else {
        words.extend(wanted.command.iter().cloned());
    }
    anyhow::ensure!(
        !words.is_empty(),
        "the image names no command: say which one to run"
    );
    Ok(words)
}

/// The image's variables, those of the command line over them, and what programs expect to be there.
fn env(config: &RunConfig, user: &User, wanted: &Wanted) -> Vec<String> {
    fn name(variable: &str) -> &str {
        variable.split('=').next().unwrap_or(variable)
    }
    let mut env = vec![PATH.to_owned()];
    if wanted.terminal {
        env.push("TERM=xterm".to_owned());
    }
    let home = user.home.as_deref().unwrap_or("/");
    env.push(format!("HOME={home}"));
    for variable in config.env.iter().chain(&wanted.env) {
        env.retain(|other| name(other) != name(variable));
        env.push(variable.clone());
    }
    env
}

fn directory(config: &RunConfig, wanted: &Wanted) -> anyhow::Result<PathBuf> {
    let own = Some(&config.working_dir).filter(|dir| !dir.is_empty());
    let dir = wanted.dir.as_ref().or(own).map_or("/", String::as_str);
    anyhow::ensure!(
        dir.starts_with('/'),
        "{dir:?} is not an absolute directory to start in"
    );
    Ok(dir.into())
}

fn capabilities(user: &User) -> anyhow::Result<oci_spec::runtime::LinuxCapabilities> {
    let all: Capabilities = CAPABILITIES.into_iter().collect();
    // Who is not root gets them by programs that carry them, and in no other way.
    let now = match user.uid {
        0 => all.clone(),
        _ => Capabilities::default(),
    };
    Ok(LinuxCapabilitiesBuilder::default()
        .bounding(all)
        .effective(now.clone())
        .permitted(now)
        .inheritable(Capabilities::default())
        .ambient(Capabilities::default())
        .build()?)
}

fn bind(source: &Path, target: &Path, read_only: bool) -> anyhow::Result<Mount> {
    let way = if read_only { "ro" } else { "rw" };
    Ok(MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(["rbind", "rprivate", way].map(str::to_owned).to_vec())
        .build()?)
}

fn linux(wanted: &Wanted) -> anyhow::Result<oci_spec::runtime::Linux> {
    let mut kinds = vec![
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    if wanted.no_network {
        kinds.push(LinuxNamespaceType::Network);
    }
    let spaces: Result<Vec<_>, _> = kinds
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build())
        .collect();
    // The runtime allows what every container has, like /dev/null, by itself.
    let no_devices = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm")
        .build()?;
    let resources = LinuxResourcesBuilder::default()
        .devices(vec![no_devices])
        .build()?;
    let mut linux = LinuxBuilder::default();
    if !wanted.rootless {
        linux = linux.resources(resources);
    }
    linux
        .namespaces(spaces?)
        .masked_paths(oci_spec::runtime::get_default_maskedpaths())
        .readonly_paths(oci_spec::runtime::get_default_readonly_paths())
        .build()
        .context("the container's namespaces")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn image() -> RunConfig {
        RunConfig {
            env: vec!["PATH=/bin".into(), "A=1".into()],
            entrypoint: vec!["/entry".into()],
            cmd: vec!["one".into()],
            working_dir: "/work".into(),
            ..RunConfig::default()
        }
    }

    fn root() -> User {
        User {
            uid: 0,
            gid: 0,
            groups: vec![4],
            home: Some("/root".into()),
        }
    }

    #[test]
    fn the_images_config_and_what_is_wanted_of_it() {
        let words = |wanted| command(&image(), &wanted).unwrap().join(" ");
        assert_eq!(words(Wanted::default()), "/entry one");
        let two = vec!["two".to_owned()];
        let with = |command, entrypoint: Option<&str>| Wanted {
            command,
            entrypoint: entrypoint.map(str::to_owned),
            ..Wanted::default()
        };
        assert_eq!(words(with(two.clone(), None)), "/entry two");
        assert_eq!(words(with(two, Some("/sh"))), "/sh two");
        assert_eq!(words(with(Vec::new(), Some("/sh"))), "/sh");
        assert!(command(&RunConfig::default(), &Wanted::default()).is_err());
        let wanted = Wanted {
            env: vec!["A=2".into()],
            ..Wanted::default()
        };
        assert_eq!(
            env(&image(), &root(), &wanted),
            ["HOME=/root", "PATH=/bin", "A=2"]
        );
        let dir = |dir: Option<&str>| Wanted {
            dir: dir.map(str::to_owned),
            ..Wanted::default()
        };
        assert_eq!(directory(&image(), &dir(None)).unwrap(), Path::new("/work"));
        assert_eq!(
            directory(&image(), &dir(Some("/x"))).unwrap(),
            Path::new("/x")
        );
        assert!(directory(&image(), &dir(Some("x"))).is_err());
    }

    #[test]
    fn the_document_is_one_that_runtimes_know() {
        let json =
            serde_json::to_value(spec(&image(), &root(), &Wanted::default()).unwrap()).unwrap();
        assert_eq!(
            json["process"]["args"],
            serde_json::json!(["/entry", "one"])
        );
        assert_eq!(
            json["process"]["user"]["additionalGids"],
            serde_json::json!([4])
        );
        assert_eq!(json["root"]["path"], "rootfs");
        let spaces = json["linux"]["namespaces"].as_array().unwrap();
        assert!(spaces.iter().all(|space| space["type"] != "network"));
        assert_eq!(json["linux"]["resources"]["devices"][0]["allow"], false);
        let other = User { uid: 5, ..root() };
        let json =
            serde_json::to_value(spec(&image(), &other, &Wanted::default()).unwrap()).unwrap();
        assert_eq!(
            json["process"]["capabilities"]["effective"],
            serde_json::json!([])
        );
    }

    #[test]
    fn volumes() {
        let volume = |text: &str| text.parse::<Volume>();
        let read_only = volume("/a:/b:ro").unwrap();
        assert_eq!(
            (read_only.source.as_path(), read_only.read_only),
            (Path::new("/a"), true)
        );
        assert!(!volume("/a:/b").unwrap().read_only);
        for bad in ["/a", "a:/b", "/a:b", "/a:/b:x", "/a:/b:ro:", ""] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }
}
