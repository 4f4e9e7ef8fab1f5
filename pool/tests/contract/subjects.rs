//! Donors of every kind, for the suite.

use std::{
    io::{BufRead, BufReader, Write as _},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex},
};

use harbour_pool::{
    HugePages,
    donor::{DonorConfig, DonorServer},
    faulty::{Faulty, Schedule},
    local::LocalDonor,
    shm::{ShmTransport, frames::Token},
    transport::{Access, RegionInfo, Transport, TransportError},
};
use tempfile::TempDir;

use crate::suite::{REGIONS, Subject, soon};

/// A donor inside this process, without sockets.
pub struct Local(Arc<LocalDonor>);

impl Local {
    pub fn new() -> Self {
        Self(LocalDonor::new("test", 1, &REGIONS.map(|len| len as usize)))
    }
}

impl Subject for Local {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        Ok(Arc::new(self.0.connect(epoch, access)?))
    }

    fn regions(&self) -> Vec<RegionInfo> {
        self.0.regions()
    }

    fn renew(&self) -> u64 {
        self.0.renew(2, &REGIONS.map(|len| len as usize));
        2
    }

    fn kill(&self) {
        self.0.stop();
    }
}

/// Any other, with the wrapper around its connections.
pub struct Wrapped<S>(pub S);

impl<S: Subject> Subject for Wrapped<S> {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        Ok(Arc::new(Faulty::new(
            self.0.connect(epoch, access)?,
            Schedule::quiet(),
        )))
    }

    fn regions(&self) -> Vec<RegionInfo> {
        self.0.regions()
    }

    fn renew(&self) -> u64 {
        self.0.renew()
    }

    fn kill(&self) {
        self.0.kill();
    }
}

/// A donor's server on a thread of this process.
pub struct Threaded {
    dir: TempDir,
    server: Mutex<Option<DonorServer>>,
}

pub fn config(socket: PathBuf) -> DonorConfig {
    DonorConfig {
        regions: REGIONS.to_vec(),
        huge: HugePages::Never,
        ..DonorConfig::new("test", socket, 0)
    }
}

impl Threaded {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut DonorConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path().join("donor"));
        change(&mut config);
        Self {
            dir,
            server: Mutex::new(Some(DonorServer::start(config).unwrap())),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("donor")
    }

    pub fn server<T>(&self, call: impl FnOnce(&DonorServer) -> T) -> T {
        call(self.server.lock().unwrap().as_ref().unwrap())
    }
}

impl Subject for Threaded {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        connect(self.socket(), epoch, access)
    }

    fn regions(&self) -> Vec<RegionInfo> {
        self.server(DonorServer::regions)
    }

    fn renew(&self) -> u64 {
        self.server(|server| server.renew(&REGIONS)).unwrap()
    }

    fn kill(&self) {
        self.server.lock().unwrap().take().unwrap().stop();
    }
}

/// A donor in a process of its own, killed with SIGKILL.
pub struct Process {
    dir: TempDir,
    child: Mutex<(Child, ChildStdin, BufReader<ChildStdout>)>,
}

/// Tells this test binary to be a donor, on the socket that it names.
const DONOR: &str = "HARBOUR_TEST_DONOR";
/// What a donor's process says begins with this, to tell it from what the test harness says.
const SAYS: &str = "donor says ";

impl Process {
    pub fn new() -> Self {
        Self::as_user(None)
    }

    pub fn as_user(uid: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = match uid {
            Some(_) => Command::new(reachable_binary(dir.path())),
            None => Command::new(std::env::current_exe().unwrap()),
        };
        command
            .args(["--exact", "donor_process", "--nocapture"])
            .env(DONOR, dir.path().join("donor"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(uid)).unwrap();
            command.uid(uid);
        }
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let process = Self {
            dir,
            child: Mutex::new((child, stdin, BufReader::new(stdout))),
        };
        assert_eq!(process.hear(), "ready");
        process
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("donor")
    }

    fn hear(&self) -> String {
        let mut child = self.child.lock().unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                child.2.read_line(&mut line).unwrap(),
                0,
                "the donor's process ended"
            );
            if let Some((_, said)) = line.split_once(SAYS) {
                return said.trim().to_owned();
            }
        }
    }
}

impl Subject for Process {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        connect(self.socket(), epoch, access)
    }

    fn regions(&self) -> Vec<RegionInfo> {
        let transport =
            ShmTransport::connect(&self.socket(), 0, Access::Read, Token::NONE, soon()).unwrap();
        transport.regions().to_vec()
    }

    fn renew(&self) -> u64 {
        writeln!(self.child.lock().unwrap().1, "renew").unwrap();
        self.hear().parse().unwrap()
    }

    fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        child.0.kill().unwrap();
        child.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A copy of this test binary in `dir` that every user can run.
pub fn reachable_binary(dir: &Path) -> PathBuf {
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
    let copy = dir.join("contract");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
    copy
}

/// The other side of [`Process`].
pub fn be_a_donor_if_asked() {
    let Some(socket) = std::env::var_os(DONOR) else {
        return;
    };
    let server = DonorServer::start(config(socket.into())).unwrap();
    println!("\n{SAYS}ready");
    // Ends with the test that started it, however that ends.
    for line in std::io::stdin().lines() {
        assert_eq!(line.unwrap(), "renew");
        println!("\n{SAYS}{}", server.renew(&REGIONS).unwrap());
    }
}

fn connect(
    socket: PathBuf,
    epoch: u64,
    access: Access,
) -> Result<Arc<dyn Transport>, TransportError> {
    Ok(Arc::new(ShmTransport::connect(
        &socket,
        epoch,
        access,
        Token::NONE,
        soon(),
    )?))
}
