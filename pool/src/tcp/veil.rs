//! TLS under the frames of a data connection.
//!
//! Greeting, hello and welcome are as without it: they show proofs, never tokens. Then both ends begin
//! TLS on the same socket, each with a certificate, and everything after goes under it. Who listens
//! learns how much is read, and not what. A donor that was given a [`Veil`] serves nobody without, and
//! a reader knows by the donor's address (`tls:…`) that it does.

use std::{
    fmt,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    net::TcpStream,
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Instant,
};

use nix::{
    poll::PollFlags,
    sys::socket::{MsgFlags, sendmsg},
};
use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection,
    pki_types::ServerName,
};

use super::socket;

/// Bytes that TLS takes before they are on their way.
const BUFFER_BYTES: usize = 256 << 10;

/// What makes a host's side of TLS. It is asked at every connection, so that renewed certificates count.
#[derive(Clone)]
pub struct Veil {
    client: Arc<dyn Fn() -> Arc<ClientConfig> + Send + Sync>,
    server: Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>,
}

impl Veil {
    /// From what gives the configurations for connecting and for being connected to.
    pub fn new(
        client: impl Fn() -> Arc<ClientConfig> + Send + Sync + 'static,
        server: impl Fn() -> Arc<ServerConfig> + Send + Sync + 'static,
    ) -> Self {
        Self {
            client: Arc::new(client),
            server: Arc::new(server),
        }
    }
}

impl fmt::Debug for Veil {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Veil")
    }
}

/// A connection with or without TLS.
pub(crate) enum Wire {
    Plain(TcpStream),
    Veiled(Box<Veiled>),
}

/// A connection under TLS.
pub(crate) struct Veiled {
    stream: TcpStream,
    tls: Connection,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.is_plain() { "plain" } else { "veiled" };
        f.debug_tuple(name).field(self.stream()).finish()
    }
}

impl Wire {
    /// The reader's side, after its welcome; `None` when the deadline passed first.
    pub(crate) fn to_donor(
        stream: TcpStream,
        veil: Option<&Veil>,
        deadline: Instant,
    ) -> io::Result<Option<Self>> {
        let Some(veil) = veil else {
            return Ok(Some(Self::Plain(stream)));
        };
        let name = ServerName::from(stream.peer_addr()?.ip());
        let tls = ClientConnection::new((veil.client)(), name).map_err(invalid)?;
        Self::begin(stream, tls.into(), deadline)
    }

    /// The donor's side, after it said welcome.
    pub(crate) fn to_reader(
        stream: TcpStream,
        veil: &Veil,
        deadline: Instant,
    ) -> io::Result<Option<Self>> {
        let tls = ServerConnection::new((veil.server)()).map_err(invalid)?;
        Self::begin(stream, tls.into(), deadline)
    }

    fn begin(
        stream: TcpStream,
        mut tls: Connection,
        deadline: Instant,
    ) -> io::Result<Option<Self>> {
        tls.set_buffer_limit(Some(BUFFER_BYTES));
        let mut veiled = Veiled { stream, tls };
        let done = veiled.shake_hands(deadline)?;
        Ok(done.then(|| Self::Veiled(Box::new(veiled))))
    }

    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    /// The socket, to wait on.
    pub(crate) fn stream(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Veiled(veiled) => &veiled.stream,
        }
    }

    /// Whether something that was sent is not on its way yet: [`Wire::push`] goes on with it.
    pub(crate) fn sending(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Veiled(veiled) => veiled.tls.wants_write(),
        }
    }

    /// Sends of what lies here as much as the socket takes.
    pub(crate) fn push(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Veiled(veiled) => veiled.push(),
        }
    }

    /// Takes what is there; an error of kind `WouldBlock` or `TimedOut` when nothing is.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(into),
            Self::Veiled(veiled) => veiled.read(&mut [IoSliceMut::new(into)]),
        }
    }

    /// The same into several places, one after the other.
    pub(crate) fn read_vectored(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read_vectored(parts),
            Self::Veiled(veiled) => veiled.read(parts),
        }
    }

    /// Sends as much of `parts` as can be taken; an error of kind `WouldBlock` or `TimedOut` when
    /// nothing can.
    pub(crate) fn send(&mut self, parts: &[IoSlice<'_>], flags: MsgFlags) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => {
                let flags = flags | MsgFlags::MSG_NOSIGNAL;
                Ok(sendmsg::<()>(stream.as_raw_fd(), parts, &[], flags, None)?)
            }
            Self::Veiled(veiled) => veiled.send(parts),
        }
    }
}

impl Veiled {
    fn shake_hands(&mut self, deadline: Instant) -> io::Result<bool> {
        while self.tls.is_handshaking() || self.tls.wants_write() {
            self.push()?;
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, self.tls.is_handshaking());
            events.set(PollFlags::POLLOUT, self.tls.wants_write());
            if events.is_empty() {
                break;
            }
            if !socket::wait(&self.stream, events, deadline)? {
                return Ok(false);
            }
            if !self.tls.is_handshaking() {
                continue;
            }
            match self.take() {
                Ok(0) => return Err(io::ErrorKind::ConnectionReset.into()),
                Err(error) if !nothing_yet(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(true)
    }

    /// One read of the socket; 0 at its end.
    fn take(&mut self) -> io::Result<usize> {
        let len = self.tls.read_tls(&mut &self.stream)?;
        if let Err(error) = self.tls.process_new_packets() {
            // The other end learns why.
            let _alert = self.push();
            return Err(invalid(error));
        }
        Ok(len)
    }

    fn push(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &self.stream) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if nothing_yet(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.push()?;
        loop {
            match self.drain(parts) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if self.take()? == 0 {
                return Ok(0);
            }
        }
    }

    /// Takes what was deciphered already.
    fn drain(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut got = 0;
        let mut reader = self.tls.reader();
        for part in parts {
            let mut rest = &mut **part;
            while !rest.is_empty() {
                match reader.read(rest) {
                    Ok(0) => return Ok(got),
                    Ok(len) => {
                        got += len;
                        rest = rest.get_mut(len..).unwrap_or_default();
                    }
                    Err(_) if got > 0 => return Ok(got),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(got)
    }

    fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.push()?;
        if self.tls.wants_write() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = self.tls.writer().write_vectored(parts)?;
        self.push()?;
        Ok(taken)
    }
}

fn nothing_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("TLS of the data connection: {error}"),
    )
}
