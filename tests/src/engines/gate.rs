//! The one way from an engine's network to the registry: it counts what comes back, and it can be
//! shut.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;

use super::Net;

/// How often it is looked whether somebody came, or whether to end.
const POLL: Duration = Duration::from_millis(2);
/// Until the registry takes a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Connections at a time; an engine has a few for each pull.
const CONNECTIONS_MAX: usize = 256;

/// Forwards one address of an engine's network to the same address of this process's.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// From the registry to the engine.
    bytes: AtomicU64,
    shut: AtomicBool,
    end: AtomicBool,
    /// Both ends of what is connected, to be cut.
    streams: Mutex<Vec<TcpStream>>,
}

impl Gate {
    /// Opens the way to the registry at `address`.
    pub fn open(net: &Net, address: SocketAddr) -> Result<Self> {
        let listener = net.listen(address)?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || serve(&listener, address, &shared)
        });
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Bytes that have come from the registry, heads of HTTP and all.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Acquire)
    }

    /// Lets nobody through any more, or again.
    pub fn shut(&self, shut: bool) {
        self.shared.shut.store(shut, Ordering::Release);
        if shut {
            self.shared.cut();
        }
    }
}

impl Shared {
    fn cut(&self) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Keeps both ends in sight; `None` when there are too many already.
    fn keep(&self, streams: [&TcpStream; 2]) -> Option<()> {
        let mut kept = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|stream| stream.peer_addr().is_ok());
        if kept.len() >= 2 * CONNECTIONS_MAX {
            return None;
        }
        for stream in streams {
            kept.push(stream.try_clone().ok()?);
        }
        Some(())
    }
}

fn serve(listener: &TcpListener, address: SocketAddr, shared: &Arc<Shared>) {
    while !shared.end.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((engine, _)) if !shared.shut.load(Ordering::Acquire) => {
                // Who cannot be served sees the connection closed.
                let _ = connect(engine, address, shared);
            }
            Ok(_) => {}
            Err(_) => thread::sleep(POLL),
        }
    }
}

fn connect(engine: TcpStream, address: SocketAddr, shared: &Arc<Shared>) -> Option<()> {
    let registry = TcpStream::connect_timeout(&address, CONNECT_LIMIT).ok()?;
    engine.set_nonblocking(false).ok()?;
    shared.keep([&engine, &registry])?;
    let back = (registry.try_clone().ok()?, engine.try_clone().ok()?);
    thread::spawn(move || pass(engine, registry, |_| {}));
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        pass(back.0, back.1, |n| {
            shared.bytes.fetch_add(n, Ordering::AcqRel);
        });
    });
    Some(())
}

/// Copies until one end is closed, then closes the same direction of the other.
fn pass(mut from: TcpStream, mut to: TcpStream, count: impl Fn(u64)) {
    let mut buffer = vec![0_u8; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        count(n as u64);
        if to.write_all(&buffer[..n]).is_err() {
            let _ = from.shutdown(Shutdown::Read);
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.shared.cut();
    }
}
