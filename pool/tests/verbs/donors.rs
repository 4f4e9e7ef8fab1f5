//! Donors that lend over RDMA.

use std::{
    fs,
    io::{BufRead, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex},
};

use harbour_pool::{
    HugePages,
    donor::{DonorConfig, DonorServer},
    token::{RegionKey, Token},
    transport::{Access, RegionId, RegionInfo, Transport, TransportError},
    verbs::VerbsTransport,
};
use tempfile::TempDir;

use crate::suite::{REGIONS, Subject, soon};

/// The address of the donor's device, and the name of the readers'.
pub fn devices() -> (IpAddr, String) {
    let both = std::env::var("HARBOUR_TEST_RDMA")
        .expect("these tests need RDMA devices (HARBOUR_TEST_RDMA=address,device): tests/run rdma");
    let (address, device) = both.split_once(',').unwrap();
    (address.parse().unwrap(), device.to_owned())
}

pub fn config(socket: PathBuf) -> DonorConfig {
    DonorConfig {
        regions: REGIONS.to_vec(),
        huge: HugePages::Never,
        listen: vec![SocketAddr::new(devices().0, 0)],
        ..DonorConfig::new("test", socket, 0)
    }
}

/// Where a donor is, and what opens it.
#[derive(Clone)]
pub struct Place {
    pub peer: SocketAddr,
    pub keys: Vec<RegionKey>,
}

impl Place {
    fn of(server: &DonorServer) -> Self {
        assert_eq!(
            server.rdma_addresses(),
            [devices().0],
            "the donor found its device"
        );
        Self {
            peer: server.listening()[0],
            keys: server.keys(),
        }
    }

    pub fn connect(&self, epoch: u64, access: Access) -> Result<VerbsTransport, TransportError> {
        let device = devices().1;
        VerbsTransport::connect(self.peer, Some(&device), epoch, access, &self.keys, soon())
    }
}

/// A donor's server on a thread of this process.
pub struct Threaded {
    _dir: TempDir,
    server: Mutex<Option<DonorServer>>,
    /// As it was last: a donor that is gone has none.
    place: Mutex<Place>,
}

impl Threaded {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut DonorConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path().join("donor"));
        change(&mut config);
        let server = DonorServer::start(config).unwrap();
        Self {
            place: Mutex::new(Place::of(&server)),
            _dir: dir,
            server: Mutex::new(Some(server)),
        }
    }

    pub fn place(&self) -> Place {
        self.place.lock().unwrap().clone()
    }

    pub fn server<T>(&self, call: impl FnOnce(&DonorServer) -> T) -> T {
        call(self.server.lock().unwrap().as_ref().unwrap())
    }
}

impl Subject for Threaded {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        Ok(Arc::new(self.place().connect(epoch, access)?))
    }

    fn regions(&self) -> Vec<RegionInfo> {
        self.server(DonorServer::regions)
    }

    fn renew(&self) -> u64 {
        let epoch = self.server(|server| server.renew(&REGIONS)).unwrap();
        *self.place.lock().unwrap() = self.server(Place::of);
        epoch
    }

    fn kill(&self) {
        self.server.lock().unwrap().take().unwrap().stop();
    }
}

/// A donor in a process of its own, killed with SIGKILL.
pub struct Process {
    _dir: TempDir,
    child: Mutex<(Child, ChildStdin, BufReader<ChildStdout>)>,
    place: Mutex<Place>,
}

/// Tells this test binary to be a donor, on the socket that it names.
const DONOR: &str = "HARBOUR_TEST_DONOR";
/// The lengths of its regions.
const LENS: &str = "HARBOUR_TEST_LENS";
/// What a donor's process says begins with this, to tell it from what the test harness says.
const SAYS: &str = "donor says ";

impl Process {
    pub fn new() -> Self {
        Self::lending(&REGIONS)
    }

    pub fn lending(lens: &[u64]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lens: Vec<_> = lens.iter().map(ToString::to_string).collect();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "donor_process", "--nocapture"])
            .env(DONOR, dir.path().join("donor"))
            .env(LENS, lens.join(","))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut child = (child, stdin, BufReader::new(stdout));
        let place = read_place(&hear(&mut child.2));
        Self {
            _dir: dir,
            child: Mutex::new(child),
            place: Mutex::new(place),
        }
    }

    pub fn place(&self) -> Place {
        self.place.lock().unwrap().clone()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    pub fn id(&self) -> u32 {
        self.child.lock().unwrap().0.id()
    }

    /// Ticks of processor time that it has had, in user mode and in the kernel.
    pub fn ticks(&self) -> (u64, u64) {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        let fields: Vec<_> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .collect();
        (fields[11].parse().unwrap(), fields[12].parse().unwrap())
    }
}

impl Subject for Process {
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError> {
        Ok(Arc::new(self.place().connect(epoch, access)?))
    }

    fn regions(&self) -> Vec<RegionInfo> {
        self.place().connect(0, Access::Read).unwrap().regions()
    }

    fn renew(&self) -> u64 {
        let mut child = self.child.lock().unwrap();
        writeln!(child.1, "renew").unwrap();
        let epoch = hear(&mut child.2).parse().unwrap();
        *self.place.lock().unwrap() = read_place(&hear(&mut child.2));
        epoch
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

fn hear(stdout: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert_ne!(
            stdout.read_line(&mut line).unwrap(),
            0,
            "the donor's process ended"
        );
        if let Some((_, said)) = line.split_once(SAYS) {
            return said.trim().to_owned();
        }
    }
}

fn say_place(place: &Place) -> String {
    let hex = |token: Option<Token>| -> String {
        token
            .unwrap()
            .0
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let keys = place
        .keys
        .iter()
        .flat_map(|key| [hex(key.read), hex(key.write)]);
    [place.peer.to_string()]
        .into_iter()
        .chain(keys)
        .collect::<Vec<_>>()
        .join(" ")
}

fn read_place(said: &str) -> Place {
    let words: Vec<_> = said.split(' ').collect();
    let token = |word: &str| {
        let byte = |at: usize| u8::from_str_radix(&word[2 * at..2 * at + 2], 16).unwrap();
        Some(Token(std::array::from_fn(byte)))
    };
    let keys = words[1..]
        .chunks(2)
        .zip(0..)
        .map(|(pair, region)| RegionKey {
            region: RegionId(region),
            read: token(pair[0]),
            write: token(pair[1]),
        });
    Place {
        peer: words[0].parse().unwrap(),
        keys: keys.collect(),
    }
}

/// The other side of [`Process`].
pub fn be_a_donor_if_asked() {
    let Some(socket) = std::env::var_os(DONOR) else {
        return;
    };
    let lens = std::env::var(LENS).unwrap();
    let lens: Vec<u64> = lens.split(',').map(|len| len.parse().unwrap()).collect();
    let mut config = config(socket.into());
    config.regions = lens.clone();
    let server = DonorServer::start(config).unwrap();
    println!("\n{SAYS}{}", say_place(&Place::of(&server)));
    // Ends with the test that started it, however that ends.
    for line in std::io::stdin().lines() {
        assert_eq!(line.unwrap(), "renew");
        println!("\n{SAYS}{}", server.renew(&lens).unwrap());
        println!("{SAYS}{}", say_place(&Place::of(&server)));
    }
}
