//! Why a donor could not start, or not go on.

use std::{io, net::SocketAddr, path::PathBuf};

use crate::memory::MemoryError;

/// A donor could not start, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum DonorError {
    /// The configuration makes no sense.
    #[error("donor {name}: {what}")]
    Config {
        /// Name of the donor.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// Somebody else answers on the socket.
    #[error("another donor is alive on {}", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket lies where the socket should be; it was left alone.
    #[error("{} is there and not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Memory could not be had.
    #[error("donor {name} cannot lend its memory")]
    Memory {
        /// Name of the donor.
        name: String,
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// A socket for other hosts could not be had.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("{what} failed for {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The socket or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
