//! A connected client of the metadata daemon.
//!
//! [`Client`] has one method for each call of `harbour.proto`, with a deadline on every one, and
//! helpers where a list is longer than a frame: [`Client::snapshot`] collects pages,
//! [`Client::put_index`] and [`Client::stage_layer`] cut. A channel that broke connects again at
//! the next call; the calls in between fail with [`Error::Unavailable`].
//!
//! The server in `harbour-metad` uses the same generated module, [`v1`].

mod calls;
mod connect;
mod endpoint;
mod error;
mod locks;
mod stream;
pub mod tls;

/// Messages, clients and servers, generated from `metad/proto/harbour.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used
)]
pub mod v1 {
    tonic::include_proto!("harbour.v1");

    /// Tokens are left out: what is formatted ends in logs.
    impl std::fmt::Debug for Region {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Region")
                .field("id", &self.id)
                .field("len", &self.len)
                .field("huge_pages", &self.huge_pages)
                .finish_non_exhaustive()
        }
    }
}

pub use connect::Client;
pub use endpoint::{Endpoint, EndpointError};
pub use error::Error;
pub use locks::LockSession;
pub use stream::{Snapshot, Watch};
pub use tls::Trust;

/// Largest message in either direction, in bytes.
pub const FRAME_MAX: usize = 1 << 20;

/// Largest piece of an index in one message, in bytes.
pub const INDEX_CHUNK_MAX: usize = 512 << 10;

/// Objects that one `FindObjects` may ask for.
pub const FIND_OBJECTS_MAX: usize = 8192;

/// Layers that one `FindLayers` may ask for.
pub const FIND_LAYERS_MAX: usize = 2048;

/// Packs that one `Locate` may ask for.
pub const LOCATE_MAX: usize = 4096;

/// Packs that one `Reserve` or `CommitRefill` may name.
pub const RESERVE_MAX: usize = 4096;
