//! Container engines of this host: whether they are set up, and whether that still holds.
//!
//! An engine that is not here, or that nobody set up, is no problem. One that was set up and quietly goes its
//! own way is: it works, and pulls everything to its own disk.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Context, Finding, Grade, finding};
use crate::{
    bounded,
    commands::setup::{self, plan},
    setup::{
        Engine, Release, SNAPSHOTTER, ask,
        containerd::{self, Effective, Wanted},
        docker,
        files::Found,
        journal, podman,
    },
};

/// How long an engine may take to say what it has.
const LIMIT: Duration = Duration::from_secs(10);
/// Files of containerds that are looked at.
const FILES_MAX: usize = 4;
const RESTART: &str = "harbour setup containerd, then systemctl restart containerd";

pub(super) fn engines(context: &Context) -> Vec<Finding> {
    let mut findings = Vec::new();
    let daemon = Daemon::find(context);
    findings.extend(containerds(context, daemon.as_ref()));
    findings.extend(daemon.map(|daemon| daemon.judge()));
    findings.extend(podman(context));
    findings
}

fn noted(context: &Context, engine: Engine) -> bool {
    journal::is_noted(&setup::state(context), engine)
}

/// One containerd and its file.
struct One<'a> {
    context: &'a Context,
    program: PathBuf,
    release: Release,
    file: PathBuf,
    text: String,
}

fn containerds(context: &Context, daemon: Option<&Daemon>) -> Vec<Finding> {
    let Some(program) = ask::find("containerd") else {
        return Vec::new();
    };
    let release = match ask::release(&program) {
        Ok(release) => release,
        Err(error) => {
            return vec![finding("containerd", Grade::Weak, format!("{error:#}"), "")];
        }
    };
    let mut files = vec![PathBuf::from(containerd::DEFAULT_FILE)];
    for file in plan::containerd_files() {
        if !files.contains(&file) && files.len() < FILES_MAX {
            files.push(file);
        }
    }
    let mut findings = Vec::new();
    for file in files {
        let text = match Found::read(&file) {
            Ok(found) => found.text.unwrap_or_default(),
            Err(error) => {
                findings.push(finding("containerd", Grade::Weak, format!("{error:#}"), ""));
                continue;
            }
        };
        let default = file == Path::new(containerd::DEFAULT_FILE);
        let one = One {
            context,
            program: program.clone(),
            release,
            file,
            text,
        };
        // Docker's record and file are about the default file, as is ours.
        let noted = default && noted(context, Engine::Containerd);
        let docker = default && daemon.is_some_and(|daemon| daemon.set);
        findings.extend(one.judge(noted, docker));
    }
    findings
}

impl One<'_> {
    fn bad(&self, detail: &str, next: &str) -> Finding {
        let (release, file) = (self.release, self.file.display());
        let detail = format!("containerd {release}, {file}: {detail}");
        finding("containerd", Grade::Bad, detail, next)
    }

    /// Whether the file means CRI to use us, under the name of any release.
    fn means_cri(&self) -> bool {
        [Release(1, 7), Release(2, 1)].into_iter().any(|release| {
            let says = Effective::of(&self.text, release).unwrap_or_default();
            says.cri.as_deref() == Some(SNAPSHOTTER)
        })
    }

    fn judge(&self, noted: bool, docker: bool) -> Vec<Finding> {
        let effective = match self.file.exists() {
            false => Ok(Effective::default()),
            true => plan::dump(&self.program, &self.file, self.release),
        };
        let effective = match effective {
            Ok(effective) => effective,
            Err(error) => {
                let detail = format!("it does not take its file: {error:#}");
                return vec![self.bad(&detail, "mend the file; see containerd config dump")];
            }
        };
        let cri = noted || self.means_cri();
        if !cri && !docker && effective.socket.is_none() {
            let detail = format!(
                "containerd {} is not set up for this: harbour setup containerd",
                self.release
            );
            return vec![finding("containerd", Grade::Good, detail, "")];
        }
        let socket = plan::socket(&self.context.places);
        let wanted = Wanted {
            release: self.release,
            socket: &socket,
            cri,
        };
        let lacks = effective.lacks(&wanted);
        if !lacks.is_empty() {
            let next = if cri {
                RESTART
            } else {
                "harbour setup docker, then restart containerd and docker"
            };
            let quiet = match effective.cri.as_deref() {
                Some(used) if cri && used != SNAPSHOTTER => {
                    format!("it falls back to {used} without a word: ")
                }
                _ => String::new(),
            };
            return vec![self.bad(&format!("{quiet}{}", lacks.join(", and ")), next)];
        }
        if let Some(wrong) = self.deaf(&socket).or_else(|| self.unloaded(&effective)) {
            return vec![wrong];
        }
        let what = if cri {
            "CRI and who asks for it"
        } else {
            "who asks for it"
        };
        let detail = format!(
            "containerd {}, {}: {what} use the snapshotter at {}",
            self.release,
            self.file.display(),
            socket.display()
        );
        vec![finding("containerd", Grade::Good, detail, "")]
    }

    /// Whether nobody listens where the file says that our snapshotter is.
    fn deaf(&self, socket: &Path) -> Option<Finding> {
        let error = UnixStream::connect(socket).err()?;
        let there = socket.exists();
        let detail = match there {
            true => format!(
                "{} is left from a process that has gone ({error})",
                socket.display()
            ),
            false => format!("there is no {}", socket.display()),
        };
        Some(self.bad(
            &format!("its pulls fail: {detail}"),
            "start the node: harbour up -d, or systemctl start harbour",
        ))
    }

    /// Whether a containerd that runs has not read its file since.
    fn unloaded(&self, effective: &Effective) -> Option<Finding> {
        let address = effective.address.as_deref()?;
        UnixStream::connect(address).ok()?;
        let ctr = ask::find("ctr")?;
        let answer = ask::ask(&ctr, ["--address", address, "plugins", "ls"], LIMIT).ok()?;
        if !answer.good {
            return None;
        }
        let state = answer.said.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let ours = words.get(1) == Some(&SNAPSHOTTER);
            ours.then(|| words.last().copied().unwrap_or_default().to_owned())
        });
        match state.as_deref() {
            Some("ok") => None,
            Some(state) => Some(self.bad(
                &format!("its plugin {SNAPSHOTTER} is in state {state}"),
                RESTART,
            )),
            None => Some(self.bad(
                "it runs, and has not read the file since it was set up",
                "systemctl restart containerd",
            )),
        }
    }
}

/// Docker's daemon.
struct Daemon {
    release: Option<Release>,
    text: String,
    /// Whether its file has it use us.
    set: bool,
    noted: bool,
}

impl Daemon {
    fn find(context: &Context) -> Option<Self> {
        let program = ["dockerd", "docker"].into_iter().find_map(ask::find)?;
        let found = Found::read(Path::new(docker::DEFAULT_FILE)).ok()?;
        let text = found.text.unwrap_or_default();
        Some(Self {
            release: ask::release(&program).ok(),
            set: docker::is_set(&text),
            noted: noted(context, Engine::Docker),
            text,
        })
    }

    fn judge(&self) -> Finding {
        let file = docker::DEFAULT_FILE;
        let bad = |detail: String, next: &str| finding("docker", Grade::Bad, detail, next);
        if let Err(error) = serde_json::from_str::<serde_json::Value>(&self.text)
            && !self.text.trim().is_empty()
        {
            return bad(
                format!("{file}: {error}"),
                "mend it: dockerd does not start with it",
            );
        }
        let again = "harbour setup docker, then systemctl restart containerd docker";
        if !self.set {
            let half = docker::names_us(&self.text);
            return match self.noted || half {
                true => bad(format!("{file} no longer has all that was set up"), again),
                false => finding(
                    "docker",
                    Grade::Good,
                    "Docker is not set up for this: harbour setup docker, or harbour docker attach",
                    "",
                ),
            };
        }
        if let Some(release) = self.release.filter(|release| *release < docker::FIRST) {
            return bad(
                format!("{file} wants what Docker {release} does not have"),
                "harbour setup docker --undo; this release is served by harbour docker attach",
            );
        }
        match driver() {
            Some(driver) if driver != SNAPSHOTTER => bad(
                format!(
                    "dockerd stores images with {driver}, not with {SNAPSHOTTER} as {file} says"
                ),
                "systemctl restart containerd docker",
            ),
            _ => finding(
                "docker",
                Grade::Good,
                format!("{file} has dockerd use {SNAPSHOTTER}"),
                "",
            ),
        }
    }
}

/// What a dockerd that runs stores images with.
fn driver() -> Option<String> {
    let docker = ask::find("docker")?;
    let answer = ask::ask(&docker, ["info", "--format", "{{.Driver}}"], LIMIT).ok()?;
    let driver = answer.said.trim().to_owned();
    (answer.good && !driver.is_empty()).then_some(driver)
}

fn podman(context: &Context) -> Option<Finding> {
    ["podman", "crio", "buildah"]
        .into_iter()
        .find_map(ask::find)?;
    let file = match nix::unistd::geteuid().is_root() {
        true => PathBuf::from(podman::DEFAULT_FILE),
        false => podman::file_of_user()?,
    };
    let text = match Found::read(&file) {
        Ok(found) => found.text.unwrap_or_default(),
        Err(error) => return Some(finding("podman", Grade::Weak, format!("{error:#}"), "")),
    };
    let bad = |detail: String, next: &str| Some(finding("podman", Grade::Bad, detail, next));
    let stores = match podman::stores(&text) {
        Ok(stores) => stores,
        Err(error) => return bad(format!("{}: {error}", file.display()), "mend the file"),
    };
    let store = plan::store(&context.places);
    if !stores.contains(&store) {
        if noted(context, Engine::Podman) {
            let detail = format!(
                "{} no longer names the store {}",
                file.display(),
                store.display()
            );
            return bad(detail, "harbour setup podman");
        }
        let detail = "Podman is not set up for this: harbour setup podman";
        return Some(finding("podman", Grade::Good, detail, ""));
    }
    let at = store.clone();
    match bounded::within(LIMIT, move || at.is_dir()) {
        Some(true) => {
            let detail = format!("{} names the store {}", file.display(), store.display());
            Some(finding("podman", Grade::Good, detail, ""))
        }
        Some(false) => bad(
            format!(
                "{} names the store {}, which is not there",
                file.display(),
                store.display()
            ),
            "start the node: harbour up -d, or systemctl start harbour",
        ),
        None => bad(
            format!("the store {} does not answer", store.display()),
            "harbour down --force, then harbour up -d",
        ),
    }
}
