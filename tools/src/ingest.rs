//! From a source into the pool: fetch → decode → tree → pack → place → commit.
//!
//! [`pull()`](pull::pull) drives it. A pull holds a lease at metad ([`lease::Pull`]); each layer
//! that metad does not have whole is claimed ([`together`]), and unpacked by whichever pull of the
//! cluster holds the claim: on a thread of its own into a [`packer::Packer`], which stores content as it
//! streams by; the layer's index is written last, and one transaction makes the layer visible. Another
//! one at the end does the same for the image. [`refill`] goes the same way for content that the pool has lost, and what
//! readers wait for comes onto the disk of their node first, by [`readthrough`].

mod claims;
pub mod error;
mod home;
pub mod index_store;
pub mod layer;
pub mod lease;
pub mod options;
pub mod packer;
pub mod pull;
pub mod readthrough;
pub mod refill;
mod reread;
mod together;

pub use error::IngestError;
