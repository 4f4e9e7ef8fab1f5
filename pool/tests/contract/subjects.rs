//! Donors of every kind, for the suite.

use std::{
    io::{BufRead, BufReader, Write as _},
    net::SocketAddr,
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
    tcp::{TcpTransport, Veil},
    token::RegionKey,
    transport::{Access, RegionId, RegionInfo, Transport, TransportError},
};
use tempfile::TempDir;

use crate::{
    suite::{REGIONS, Subject, soon},
    veiled::Authority,
};

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

/// The same, reached over TCP.
pub struct Tcp<S> {
    donor: S,
    peer: SocketAddr,
    veil: Option<Veil>,
    /// As they were when last asked for: a donor that is gone has none.
    keys: Mutex<Vec<RegionKey>>,
}

/// A donor that listens on sockets too.
pub trait Listening: Subject {
    /// Where, and the tokens of its regions.
    fn tcp(&self) -> Option<(Vec<SocketAddr>, Vec<RegionKey>)>;
}

/// Loopback addresses that donors under test listen on.
pub const LOOPBACK: [&str; 2] = ["127.0.0.1:0", "[::1]:0"];

pub fn loopback() -> Vec<SocketAddr> {
    LOOPBACK.map(|at| at.parse().unwrap()).to_vec()
}

impl Listening for Threaded {
    fn tcp(&self) -> Option<(Vec<SocketAddr>, Vec<RegionKey>)> {
        let server = self.server.lock().unwrap();
        let server = server.as_ref()?;
        Some((server.listening().to_vec(), server.keys()))
    }
}

impl Tcp<Threaded> {
    pub fn threaded(v6: bool) -> Self {
        Self::new(Threaded::with(|config| config.listen = loopback()), v6)
    }

    /// The same under TLS.
    pub fn veiled(v6: bool) -> Self {
        let veil = Authority::new().veil();
        let change = |config: &mut DonorConfig| {
            config.listen = loopback();
            config.veil = Some(veil.clone());
        };
        let donor = Threaded::with(change);
        Self {
            veil: Some(veil),
            ..Self::new(donor, v6)
        }
    }
}

impl<S: Listening> Tcp<S> {
    pub fn new(donor: S, v6: bool) -> Self {
        let (sockets, keys) = donor.tcp().unwrap();
        let peer = *sockets.iter().find(|at| at.is_ipv6() == v6).unwrap();
        Self {
            donor,
            peer,
            veil: None,
            keys: Mutex::new(keys),
        }
    }
}

impl<S: Listening> Subject for Tcp<S> {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        if let Some((_, keys)) = self.donor.tcp() {
            *self.keys.lock().unwrap() = keys;
        }
        let keys = self.keys.lock().unwrap().clone();
        Ok(Arc::new(TcpTransport::connect(
            self.peer,
            self.veil.as_ref(),
            epoch,
            access,
            &keys,
            soon(),
        )?))
    }

    fn regions(&self) -> Vec<RegionInfo> {
        self.donor.regions()
    }

    fn renew(&self) -> u64 {
        self.donor.renew()
    }

    fn kill(&self) {
        self.donor.kill();
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

impl Listening for Process {
    fn tcp(&self) -> Option<(Vec<SocketAddr>, Vec<RegionKey>)> {
        writeln!(self.child.lock().unwrap().1, "tcp").ok()?;
        let said = self.hear();
        let mut words = said.split(' ');
        let sockets = LOOPBACK.map(|_| words.next().unwrap().parse().unwrap());
        let token = |word: &str| {
            let byte = |at| u8::from_str_radix(&word[2 * at..2 * at + 2], 16).unwrap();
            Some(Token(std::array::from_fn(byte)))
        };
        let words: Vec<_> = words.collect();
        let keys = words.chunks(2).zip(0..).map(|(pair, region)| RegionKey {
            region: RegionId(region),
            read: token(pair[0]),
            write: token(pair[1]),
        });
        Some((sockets.to_vec(), keys.collect()))
    }
}

/// What [`Process`]'s other side answers to "tcp": sockets, and the tokens of the regions from 0.
fn tcp_words(server: &DonorServer) -> String {
    let hex = |token: Option<Token>| -> String {
        token
            .unwrap()
            .0
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let sockets = server.listening().iter().map(ToString::to_string);
    let keys = server.keys();
    let keys = keys.iter().flat_map(|key| [hex(key.read), hex(key.write)]);
    sockets.chain(keys).collect::<Vec<_>>().join(" ")
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
    let mut config = config(socket.into());
    config.listen = loopback();
    let server = DonorServer::start(config).unwrap();
    println!("\n{SAYS}ready");
    // Ends with the test that started it, however that ends.
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "renew" => println!("\n{SAYS}{}", server.renew(&REGIONS).unwrap()),
            "tcp" => println!("\n{SAYS}{}", tcp_words(&server)),
            other => panic!("{other:?}"),
        }
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
