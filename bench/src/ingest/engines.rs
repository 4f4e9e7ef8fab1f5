//! Who pulls: ours, podman, docker, and skopeo with umoci.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::HARBOUR;
use crate::{
    Common,
    command::{self, Daemon, Watch},
    harbour::Harbour,
    memory::{Peak, Sampler},
    report::Report,
    sandbox::Place,
};

/// Longest wait for an engine's daemon.
const READY: Duration = Duration::from_secs(60);

/// What one pull took.
#[derive(Clone, Debug)]
pub(crate) struct Pulled {
    /// Wall time of the pull alone.
    pub(crate) seconds: f64,
    /// Peaks by the name under which they are reported.
    pub(crate) memory: Vec<(String, Peak)>,
}

/// Something that pulls images into a directory.
pub(crate) trait Engine {
    /// Name in reports.
    fn name(&self) -> &'static str;
    /// Pulls `reference`, of at most `bytes` unpacked, into `storage`, which is empty. Whatever it
    /// starts has ended when it returns.
    fn pull(&mut self, reference: &str, bytes: u64, storage: &Path) -> anyhow::Result<Pulled>;
}

/// All that this machine has; the others are noted in `report`.
pub(crate) fn all(common: &Common, place: &Place, report: &mut Report) -> Vec<Box<dyn Engine>> {
    let ours = Ours {
        program: common.harbour.clone(),
        place: place.clone(),
    };
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(ours)];
    let mut add = |engine: Box<dyn Engine>, programs: &[&str], version: &[&str]| match programs
        .iter()
        .find(|program| command::find(program).is_none())
    {
        Some(missing) => report.skip(engine.name(), format!("{missing} is not installed")),
        None => {
            let text =
                command::run(Command::new(version[0]).args(&version[1..])).unwrap_or_default();
            let text = String::from_utf8_lossy(&text)
                .lines()
                .next()
                .unwrap_or("")
                .to_owned();
            report.settings.insert(engine.name().to_owned(), text);
            engines.push(engine);
        }
    };
    add(Box::new(Podman), &["podman"], &["podman", "--version"]);
    add(
        Box::new(Docker),
        &["dockerd", "containerd", "docker"],
        &["dockerd", "--version"],
    );
    add(
        Box::new(Umoci),
        &["skopeo", "umoci"],
        &["umoci", "--version"],
    );
    engines
}

/// Runs a program to its end and looks at the memory of it, or of `instead`.
fn sampled(command: &mut Command, storage: &Path, instead: &[u32]) -> anyhow::Result<(f64, Peak)> {
    let name = command::name_of(command);
    let log = storage.join("client.log");
    let file = File::create(&log)?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0);
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let _watch = Watch::start(&child, command::DEADLINE);
    let roots = if instead.is_empty() {
        vec![child.id()]
    } else {
        instead.to_vec()
    };
    let sampler = Sampler::start(roots);
    let status = child.wait()?;
    let seconds = started.elapsed().as_secs_f64();
    let peak = sampler.finish();
    let errors = fs::read(&log)
        .map(|text| String::from_utf8_lossy(&text).into_owned())
        .unwrap_or_default();
    let start = errors.ceil_char_boundary(errors.len().saturating_sub(2000));
    command::succeeded(&name, status, &errors[start..])?;
    Ok((seconds, peak))
}

struct Ours {
    program: PathBuf,
    place: Place,
}

impl Engine for Ours {
    fn name(&self) -> &'static str {
        HARBOUR
    }

    fn pull(&mut self, reference: &str, bytes: u64, storage: &Path) -> anyhow::Result<Pulled> {
        let harbour = Harbour::up(&self.program, &self.place, "i", bytes, &[])?;
        let daemons = Sampler::start(harbour.daemons());
        let (seconds, peak) = sampled(&mut harbour.pull_command(reference), storage, &[])?;
        let daemons = daemons.finish();
        Ok(Pulled {
            seconds,
            memory: vec![
                (HARBOUR.to_owned(), peak),
                ("harbour daemons".to_owned(), daemons),
            ],
        })
    }
}

struct Podman;

impl Engine for Podman {
    fn name(&self) -> &'static str {
        "podman"
    }

    fn pull(&mut self, reference: &str, _: u64, storage: &Path) -> anyhow::Result<Pulled> {
        let policy = storage.join("policy.json");
        fs::write(
            &policy,
            r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
        )?;
        let (root, run) = (storage.join("root"), storage.join("run"));
        let config = storage.join("storage.conf");
        // It reads its places from here before it looks at its flags.
        let text = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
            root.display(),
            run.display()
        );
        fs::write(&config, text)?;
        let mut podman = Command::new("podman");
        podman.arg("--root").arg(&root).arg("--runroot").arg(&run);
        podman.args([
            "--storage-driver",
            "overlay",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "none",
        ]);
        podman
            .args(["pull", "-q", "--tls-verify=false", "--signature-policy"])
            .arg(&policy)
            .arg(reference);
        podman.env("CONTAINERS_STORAGE_CONF", &config);
        let (seconds, peak) = sampled(&mut podman, storage, &[])?;
        Ok(Pulled {
            seconds,
            memory: vec![(self.name().to_owned(), peak)],
        })
    }
}

struct Docker;

impl Engine for Docker {
    fn name(&self) -> &'static str {
        "docker"
    }

    fn pull(&mut self, reference: &str, _: u64, storage: &Path) -> anyhow::Result<Pulled> {
        // Socket addresses are short, paths of data directories may not be.
        let short = tempfile::Builder::new().prefix("hb-").tempdir_in("/tmp")?;
        let ctd_socket = short.path().join("c.sock");
        let config = storage.join("containerd.toml");
        let text = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{}\"\n",
            storage.join("containerd").display(),
            short.path().join("state").display(),
            ctd_socket.display()
        );
        fs::write(&config, text)?;
        let mut containerd = Daemon::start(
            Command::new("containerd").arg("-c").arg(&config),
            &storage.join("containerd.log"),
        )?;
        containerd.wait_ready(READY, || ctd_socket.exists())?;
        let host = format!("unix://{}", short.path().join("d.sock").display());
        let mut serve = Command::new("dockerd");
        // Pulls need neither a bridge nor a firewall.
        serve.args([
            "--bridge",
            "none",
            "--iptables=false",
            "--ip6tables=false",
            "-H",
            &host,
        ]);
        serve
            .arg("--containerd")
            .arg(&ctd_socket)
            .arg("--data-root")
            .arg(storage.join("data"));
        serve
            .arg("--exec-root")
            .arg(short.path().join("exec"))
            .arg("--pidfile")
            .arg(short.path().join("d.pid"));
        let mut dockerd = Daemon::start(&mut serve, &storage.join("dockerd.log"))?;
        dockerd.wait_ready(READY, || {
            command::run(Command::new("docker").args(["-H", &host, "version"])).is_ok()
        })?;
        let mut pull = Command::new("docker");
        pull.args(["-H", &host, "pull", "-q", reference])
            .env("DOCKER_CONFIG", storage.join("config"));
        // The client only asks: the daemons do the work.
        let pulled = sampled(&mut pull, storage, &[dockerd.pid(), containerd.pid()]);
        drop(dockerd);
        drop(containerd);
        crate::mounts::unmount_below(short.path());
        let (seconds, peak) = pulled?;
        Ok(Pulled {
            seconds,
            memory: vec![(self.name().to_owned(), peak)],
        })
    }
}

struct Umoci;

impl Engine for Umoci {
    fn name(&self) -> &'static str {
        "skopeo+umoci"
    }

    fn pull(&mut self, reference: &str, _: u64, storage: &Path) -> anyhow::Result<Pulled> {
        let layout = format!("{}:image", storage.join("oci").display());
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"]);
        copy.arg(format!("docker://{reference}"))
            .arg(format!("oci:{layout}"));
        let (copied, first) = sampled(&mut copy, storage, &[])?;
        let mut unpack = Command::new("umoci");
        unpack
            .args(["unpack", "--image", &layout])
            .arg(storage.join("bundle"));
        let (unpacked, second) = sampled(&mut unpack, storage, &[])?;
        let peak = Peak {
            hwm_kib: first.hwm_kib.max(second.hwm_kib),
            anon_kib: first.anon_kib.max(second.anon_kib),
            beyond_pool_kib: first.beyond_pool_kib.max(second.beyond_pool_kib),
        };
        Ok(Pulled {
            seconds: copied + unpacked,
            memory: vec![(self.name().to_owned(), peak)],
        })
    }
}
