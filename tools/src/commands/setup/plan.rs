//! What an engine's files are to become, and what the engine itself says to that.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use super::Context;
use crate::{
    cli::setup::{Change, Containerd, Docker},
    config::Places,
    failure::{self, Code},
    setup::{
        EditError, Edited, Engine, Release, ask,
        containerd::{self, Effective, Wanted},
        docker,
        files::Found,
        podman,
    },
};

/// How long an engine may take to look at a file.
const LOOK: Duration = Duration::from_secs(30);

/// What is to be done to one engine.
pub(super) struct Plan {
    pub(super) engine: Engine,
    pub(super) steps: Vec<Step>,
    /// What somebody should know before and after.
    pub(super) notes: Vec<String>,
    /// Units to restart, in this order.
    pub(super) units: &'static [&'static str],
}

/// One file.
pub(super) struct Step {
    pub(super) found: Found,
    pub(super) text: String,
    proof: Proof,
}

/// Who is asked whether the new file will do.
enum Proof {
    Containerd {
        program: PathBuf,
        release: Release,
        cri: bool,
        socket: PathBuf,
    },
    Dockerd(PathBuf),
    Nobody,
}

impl Step {
    fn new(found: Found, edited: Edited, proof: Proof, notes: &mut Vec<String>) -> Self {
        notes.extend(edited.notes);
        Self {
            found,
            text: edited.text,
            proof,
        }
    }

    pub(super) fn changes(&self) -> bool {
        self.found.text.as_ref() != Some(&self.text)
    }

    /// Asks the engine what it makes of the new file, where it lies for now.
    pub(super) fn prove(&self, file: &Path) -> anyhow::Result<()> {
        let path = self.found.path.display();
        match &self.proof {
            Proof::Nobody => Ok(()),
            Proof::Dockerd(program) => {
                let args = [
                    "--validate".as_ref(),
                    "--config-file".as_ref(),
                    file.as_os_str(),
                ];
                let answer = ask::ask(program, args, LOOK)?;
                if answer.good {
                    return Ok(());
                }
                Err(failure::failure(
                    Code::Refused,
                    format!("dockerd would not take the new {path}: {}", answer.why()),
                    "nothing was written; see what else is in the file",
                ))
            }
            Proof::Containerd {
                program,
                release,
                cri,
                socket,
            } => {
                let wanted = Wanted {
                    release: *release,
                    socket,
                    cri: *cri,
                };
                let lacks = dump(program, file, *release)
                    .with_context(|| format!("containerd would not take the new {path}"))?
                    .lacks(&wanted);
                if lacks.is_empty() {
                    return Ok(());
                }
                Err(failure::failure(
                    Code::Refused,
                    format!("with the new {path}, {}", lacks.join(", and ")),
                    "nothing was written; a file that it imports may say otherwise (imports), or it is of \
                     another containerd (--containerd-version)",
                ))
            }
        }
    }
}

/// What a containerd makes of a file and of what that imports.
pub(in crate::commands) fn dump(
    program: &Path,
    file: &Path,
    release: Release,
) -> anyhow::Result<Effective> {
    let args = [
        "--config".as_ref(),
        file.as_os_str(),
        "config".as_ref(),
        "dump".as_ref(),
    ];
    let answer = ask::ask(program, args, LOOK)?;
    if !answer.good {
        return Err(failure::failure(
            Code::Refused,
            answer.why(),
            "see what else is in the file",
        ));
    }
    Ok(Effective::of(&answer.said, release)?)
}

/// Where our snapshotter listens.
pub(in crate::commands) fn socket(places: &Places) -> PathBuf {
    places.run.join("snapshotter.sock")
}

/// Where the mount shows an image store.
pub(in crate::commands) fn store(places: &Places) -> PathBuf {
    places.mount.join("store")
}

/// What an edit that cannot be made means for the user.
fn refused(path: &Path, error: EditError) -> anyhow::Error {
    let next = match &error {
        EditError::Conflict { next, .. } => next.clone(),
        EditError::Syntax(_) | EditError::Kind { .. } => "mend the file first".to_owned(),
    };
    let what = format!("{}: {error}", path.display());
    failure::failure(Code::Usage, what, format!("nothing was written; {next}"))
}

/// The release that was named, else the installed program's.
fn release(named: Option<Release>, program: &str, flag: &str) -> anyhow::Result<Release> {
    if let Some(release) = named {
        return Ok(release);
    }
    let found = ask::find(program).ok_or_else(|| {
        failure::failure(
            Code::NotFound,
            format!("there is no {program} on this host to tell its version"),
            format!("say which version the file is for: {flag} VERSION"),
        )
    })?;
    ask::release(&found)
}

fn containerd_step(
    places: &Places,
    path: &Path,
    named: Option<Release>,
    cri: bool,
    notes: &mut Vec<String>,
) -> anyhow::Result<Step> {
    let release = release(named, "containerd", "--containerd-version")?;
    let found = Found::read(path)?;
    let socket = socket(places);
    let wanted = Wanted {
        release,
        socket: &socket,
        cri,
    };
    let text = found.text.as_deref().unwrap_or_default();
    let edited = containerd::edit(text, &wanted).map_err(|error| refused(&found.path, error))?;
    let program = ask::find("containerd");
    // Another release on this host has nothing to say.
    let program = program.filter(|it| ask::release(it).is_ok_and(|own| own == release));
    let proof = program.map_or(Proof::Nobody, |program| Proof::Containerd {
        program,
        release,
        cri,
        socket: socket.clone(),
    });
    Ok(Step::new(found, edited, proof, notes))
}

pub(super) fn containerd(context: &Context, args: &Containerd) -> anyhow::Result<Plan> {
    let mut notes = Vec::new();
    let path = args.change.config_file.as_deref();
    let path = path.unwrap_or(Path::new(containerd::DEFAULT_FILE));
    if args.change.config_file.is_none()
        && let Some(other) = containerd_files().into_iter().find(|file| file != path)
    {
        notes.push(format!(
            "a containerd that runs here reads {}: for that one give --config-file",
            other.display()
        ));
    }
    let step = containerd_step(
        &context.places,
        path,
        args.containerd_version,
        true,
        &mut notes,
    )?;
    notes.push(
        "images that CRI has already stay with its old snapshotter: it pulls them again, from the pool, as \
         they are next used; containers that run are not touched"
            .to_owned(),
    );
    Ok(Plan {
        engine: Engine::Containerd,
        steps: vec![step],
        notes,
        units: &["containerd"],
    })
}

pub(super) fn docker(context: &Context, args: &Docker) -> anyhow::Result<Plan> {
    let program = ["dockerd", "docker"]
        .into_iter()
        .find(|name| ask::find(name).is_some());
    let own = release(
        args.docker_version,
        program.unwrap_or("dockerd"),
        "--docker-version",
    )?;
    if own < docker::FIRST {
        return Err(failure::failure(
            Code::Refused,
            format!(
                "Docker {own} cannot keep images in containerd with a snapshotter (from {} on it can)",
                docker::FIRST
            ),
            "it can be served by its own store: harbour docker attach IMAGE…",
        ));
    }
    let at_default = args.containerd_config_file == Path::new(containerd::DEFAULT_FILE);
    if at_default && args.change.config_file.is_none() && runs_its_own() {
        return Err(failure::failure(
            Code::Refused,
            "dockerd has started a containerd of its own, whose configuration it writes anew each time",
            "have it use the host's: systemctl enable --now containerd, then restart docker, then this again",
        ));
    }
    let mut notes = Vec::new();
    let containerd = containerd_step(
        &context.places,
        &args.containerd_config_file,
        args.containerd_version,
        false,
        &mut notes,
    )?;
    let path = args.change.config_file.as_deref();
    let found = Found::read(path.unwrap_or(Path::new(docker::DEFAULT_FILE)))?;
    let text = found.text.as_deref().unwrap_or_default();
    let edited = docker::edit(text).map_err(|error| refused(&found.path, error))?;
    let dockerd = ask::find("dockerd").filter(|it| ask::release(it).is_ok_and(|it| it == own));
    let proof = dockerd.map_or(Proof::Nobody, Proof::Dockerd);
    let daemon = Step::new(found, edited, proof, &mut notes);
    if daemon.changes() {
        notes.push(
            "images and containers of Docker's present store are out of sight while this is so, and back \
             after --undo and a restart"
                .to_owned(),
        );
        notes.push("a restart of dockerd ends containers, unless it has live-restore".to_owned());
    }
    Ok(Plan {
        engine: Engine::Docker,
        steps: vec![containerd, daemon],
        notes,
        units: &["containerd", "docker"],
    })
}

pub(super) fn podman(context: &Context, args: &Change) -> anyhow::Result<Plan> {
    let root = nix::unistd::geteuid().is_root();
    let path = match &args.config_file {
        Some(path) => path.clone(),
        None if root => podman::DEFAULT_FILE.into(),
        None => podman::file_of_user().ok_or_else(|| {
            failure::failure(
                Code::Usage,
                "neither HOME nor XDG_CONFIG_HOME is set",
                "say where storage.conf is with --config-file",
            )
        })?,
    };
    let found = Found::read(&path)?;
    // A file that is there takes the place of the distribution's, which has to go into it.
    let vendor = root && args.config_file.is_none() && found.text.is_none();
    let vendor = match vendor {
        true => Found::read(Path::new(podman::VENDOR_FILE))?.text,
        false => None,
    };
    let mut notes = Vec::new();
    if vendor.is_some() {
        notes.push(format!(
            "{} takes the place of {}, so it begins with what is in there",
            found.path.display(),
            podman::VENDOR_FILE
        ));
    }
    let text = found.text.as_deref().or(vendor.as_deref());
    let edited = podman::edit(text.unwrap_or_default(), &store(&context.places), root)
        .map_err(|error| refused(&found.path, error))?;
    let step = Step::new(found, edited, Proof::Nobody, &mut notes);
    Ok(Plan {
        engine: Engine::Podman,
        steps: vec![step],
        notes,
        units: &[],
    })
}

/// Command lines of the containerds that run here, those in containers of their own left out.
fn containerds() -> Vec<Vec<String>> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let view = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    let own = view(Path::new("/proc/self"));
    let line = |entry: fs::DirEntry| {
        let bytes = fs::read(entry.path().join("cmdline")).ok()?;
        let words = bytes
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty());
        let words: Vec<String> = words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let program = Path::new(words.first()?).file_name()?;
        (program == "containerd" && view(&entry.path()) == own).then_some(words)
    };
    entries.flatten().filter_map(line).collect()
}

/// The configuration files that containerds which run here were started with.
pub(in crate::commands) fn containerd_files() -> Vec<PathBuf> {
    let file = |words: Vec<String>| {
        let at = words
            .iter()
            .position(|word| word == "--config" || word == "-c");
        let named = at.and_then(|at| words.get(at + 1).cloned());
        let joined = words.iter().find_map(|word| {
            let value = word.strip_prefix("--config=");
            value.or(word.strip_prefix("-c=")).map(str::to_owned)
        });
        named
            .or(joined)
            .map_or_else(|| containerd::DEFAULT_FILE.into(), PathBuf::from)
    };
    containerds().into_iter().map(file).collect()
}

/// Whether a dockerd runs a containerd that it configures by itself.
fn runs_its_own() -> bool {
    let own = Path::new("containerd/containerd.toml");
    containerd_files().iter().any(|file| file.ends_with(own))
}
