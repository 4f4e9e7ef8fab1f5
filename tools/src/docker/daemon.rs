//! The daemon that has a data-root: whether there is one, what it says, and how it is started again.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::Value;

use super::root::DataRoot;
use crate::{
    bounded,
    failure::{self, Code},
};

/// Where a daemon listens, when nobody says otherwise.
const SOCKETS: [&str; 2] = ["/run/docker.sock", "/var/run/docker.sock"];

/// Longest wait for one answer. Removing an image takes a daemon some time.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Largest answer.
const ANSWER_MAX: u64 = 64 << 20;

/// Longest time for a daemon to end, or to answer again.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// Whether a daemon has this data-root. A daemon holds a lock on the database of its volumes for as long as
/// it lives; before it has that, it is known by its command line.
///
/// # Errors
/// What the file system says.
pub fn is_running(root: &DataRoot) -> anyhow::Result<bool> {
    let path = root.path().join("volumes/metadata.db");
    match File::open(&path) {
        Ok(file) => {
            // Shared, so that two who ask do not take each other for a daemon; given back at once.
            if let Err(fs::TryLockError::WouldBlock) = file.try_lock_shared() {
                return Ok(true);
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context(format!("cannot open {}", path.display())),
    }
    Ok(is_starting(root))
}

fn is_starting(root: &DataRoot) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.into_iter().any(|process| {
        let comm = fs::read(process.path().join("comm")).unwrap_or_default();
        if comm != b"dockerd\n" {
            return false;
        }
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        data_root_of(line.split('\0')).is_some_and(|at| {
            let at = fs::canonicalize(&at).unwrap_or(at);
            at == root.path()
        })
    })
}

/// The data-root that a daemon's command line names.
fn data_root_of<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<PathBuf> {
    while let Some(word) = words.next() {
        for flag in ["--data-root", "-data-root", "--graph", "-g"] {
            match word.strip_prefix(flag) {
                Some("") => return words.next().map(PathBuf::from),
                Some(value) if value.starts_with('=') => return Some(value[1..].into()),
                _ => {}
            }
        }
    }
    None
}

/// What a daemon says of itself.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Info {
    /// Its storage driver.
    pub driver: String,
    driver_status: Option<Vec<Vec<String>>>,
    docker_root_dir: PathBuf,
    /// Whether containers live on while it does not.
    pub live_restore_enabled: bool,
    /// Containers that run.
    pub containers_running: u64,
}

impl Info {
    /// Whether its images are in containerd's store.
    pub fn is_containerd(&self) -> bool {
        let lines = self.driver_status.iter().flatten();
        lines.into_iter().any(|line| {
            matches!(&line[..], [key, value] if key == "driver-type" && value.contains("snapshotter"))
        })
    }
}

/// The interface of a daemon.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// The daemon at `host` (`unix:///run/docker.sock`), else where one listens by default. `None` where
    /// none answers that has this data-root.
    ///
    /// # Errors
    /// A host that is not on this one.
    pub fn of(root: &DataRoot, host: Option<&str>) -> anyhow::Result<Option<(Self, Info)>> {
        let sockets: Vec<PathBuf> = match host.filter(|host| !host.is_empty()) {
            None => SOCKETS.iter().map(PathBuf::from).collect(),
            Some(host) => {
                let path = host
                    .strip_prefix("unix://")
                    .filter(|path| path.starts_with('/'));
                let path = path.ok_or_else(|| {
                    let what = format!("{host} is no daemon of this host");
                    failure::failure(Code::Usage, what, "write --docker-host unix:///PATH")
                })?;
                vec![path.into()]
            }
        };
        for socket in sockets {
            let api = Self { socket };
            let Ok(info) = api.info() else { continue };
            let its = fs::canonicalize(&info.docker_root_dir);
            if its.is_ok_and(|its| its == root.path()) {
                return Ok(Some((api, info)));
            }
        }
        Ok(None)
    }

    fn info(&self) -> anyhow::Result<Info> {
        let (status, body) = self.ask("GET", "/info")?;
        anyhow::ensure!(status == 200, "it answers {status}");
        Ok(serde_json::from_slice(&body)?)
    }

    /// The image that a name means there.
    ///
    /// # Errors
    /// No answer.
    pub fn image(&self, name: &str) -> anyhow::Result<Option<String>> {
        let (status, body) = self.ask("GET", &format!("/images/{name}/json"))?;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        Ok(body["Id"]
            .as_str()
            .filter(|_| status == 200)
            .map(str::to_owned))
    }

    /// Removes a name, and the image when it was its last, as `docker rmi` does.
    ///
    /// # Errors
    /// No answer, or a refusal: a container has the image.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        let (status, body) = self.ask("DELETE", &format!("/images/{name}"))?;
        if matches!(status, 200 | 404) {
            return Ok(());
        }
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = body["message"].as_str().unwrap_or("it does not say why");
        Err(failure::failure(
            Code::Failed,
            format!("Docker does not remove {name}: {said}"),
            "remove what uses it first: docker ps -a",
        ))
    }

    /// One question. HTTP/1.0, so that the answer comes in one piece and ends with the connection.
    fn ask(&self, method: &str, path: &str) -> anyhow::Result<(u16, Vec<u8>)> {
        let why = || format!("{} does not answer", self.socket.display());
        let ask = || -> anyhow::Result<Vec<u8>> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            stream.set_write_timeout(Some(ANSWER_LIMIT))?;
            write!(stream, "{method} {path} HTTP/1.0\r\nHost: docker\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().with_context(why)?;
        let end = answer.windows(4).position(|part| part == b"\r\n\r\n");
        let end = end.with_context(why)?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok((status.with_context(why)?, answer[end + 4..].to_vec()))
    }
}

/// How a daemon is started again.
#[derive(Clone, Debug)]
pub struct Commands {
    /// Ends it.
    pub stop: String,
    /// Starts it.
    pub start: String,
}

/// Ends the daemon, does `work`, and starts it whatever came of that. Gives its interface again.
///
/// # Errors
/// Containers that would end with it, a daemon that does not end or does not start, or what `work` gave.
pub fn restart_around<T>(
    root: &DataRoot,
    host: Option<&str>,
    commands: &Commands,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Api)> {
    let info = Api::of(root, host)?.map(|(_, info)| info);
    let info = info.ok_or_else(|| unreachable(root))?;
    if info.containers_running > 0 && !info.live_restore_enabled {
        let n = info.containers_running;
        return Err(failure::failure(
            Code::Failed,
            format!("{n} containers would end with the daemon: it has no live-restore"),
            "set \"live-restore\": true in daemon.json and systemctl reload docker, or end them",
        ));
    }
    let stopped = sh(&commands.stop);
    let gone = || matches!(is_running(root), Ok(false)).then_some(());
    let done = match bounded::poll(CHANGE_LIMIT, gone) {
        Some(()) => work(),
        None => Err(failure::failure(
            Code::Failed,
            format!("the daemon did not end: {} ({stopped})", commands.stop),
            "name what stops it: --stop-command",
        )),
    };
    let started = sh(&commands.start);
    let back = || Api::of(root, host).ok().flatten();
    let api = bounded::poll(CHANGE_LIMIT, back).ok_or_else(|| {
        failure::failure(
            Code::Unavailable,
            format!(
                "the daemon did not come back: {} ({started})",
                commands.start
            ),
            "see why with: journalctl -u docker",
        )
    });
    let done = done?;
    Ok((done, api?.0))
}

/// No way to a daemon that is there.
pub fn unreachable(root: &DataRoot) -> anyhow::Error {
    failure::failure(
        Code::Unavailable,
        format!(
            "a daemon has {} and does not answer where it is looked for",
            root.path().display()
        ),
        "name its socket: --docker-host unix:///PATH",
    )
}

/// Runs a command line and says how it ended. A daemon that it leaves behind has none of our streams.
fn sh(line: &str) -> String {
    let mut command = Command::new("sh");
    command.arg("-c").arg(line);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    match command.status() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_running_daemon_is_known_by_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let root = DataRoot::at(dir.path());
        assert!(!is_running(&root).unwrap());
        fs::create_dir(dir.path().join("volumes")).unwrap();
        let file = File::create(dir.path().join("volumes/metadata.db")).unwrap();
        assert!(!is_running(&root).unwrap());
        file.lock().unwrap();
        assert!(is_running(&root).unwrap());
        drop(file);
        assert!(!is_running(&root).unwrap());
    }

    #[test]
    fn a_data_root_is_read_from_a_command_line() {
        let of = |line: &str| data_root_of(line.split(' '));
        let root = Some(PathBuf::from("/d"));
        assert_eq!(of("dockerd --data-root /d -H fd://"), root);
        assert_eq!(of("dockerd --data-root=/d"), root);
        assert_eq!(of("dockerd -g /d"), root);
        assert_eq!(of("dockerd -H fd:// --group docker"), None);
    }

    #[test]
    fn a_daemon_says_where_its_images_are() {
        let info = |text: &str| serde_json::from_str::<Info>(text).unwrap();
        let old = info(r#"{"Driver":"overlay2","DriverStatus":[["Backing Filesystem","extfs"]]}"#);
        assert!(!old.is_containerd());
        let new = r#"{"Driver":"overlayfs","DriverStatus":[["driver-type","io.containerd.snapshotter.v1"]]}"#;
        assert!(info(new).is_containerd());
        assert!(!info(r#"{"DriverStatus":null}"#).is_containerd());
    }
}
