//! From a source into the pool: fetch → decode → tree → pack → place → commit.
//!
//! [`pull()`](pull::pull) drives it. A pull holds a lease at metad ([`lease::Pull`]); each layer
//! that metad does not have whole is decoded on a thread of its own into a [`packer::Packer`], which
//! stores content as it streams by; the index is written last, and one transaction at the end makes
//! everything visible. [`refill`] goes the same way for content that the pool has lost, and what
//! readers wait for comes onto the disk of their node first, by [`readthrough`].

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

pub use error::IngestError;
