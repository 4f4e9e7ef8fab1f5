//! The mount: images and layers as directories and as EROFS files, read from memory that hosts lend.
//!
//! The path of one read: [`adapter`](crate::session) turns a FUSE request into a call on [`Fs`];
//! the node number tells the view and the EROFS nid ([`inode`]); the view's index, read lazily and
//! checked granule by granule, tells which objects fill the range; those are read from a donor,
//! checked, and answered. What the rest of the system must give is in [`source`].
//!
//! Only `adapter.rs` and `session.rs` know FUSE. Everything else runs in tests with no mount.
#![forbid(unsafe_code)]

mod adapter;
mod ahead;
mod attr;
mod budget;
mod buffers;
pub mod config;
mod control;
pub mod errno;
pub mod error;
pub mod fastview;
pub mod inode;
pub mod ops;
mod read;
pub mod session;
mod slow;
pub mod source;
pub mod stats;
mod view;
pub mod why;

pub use crate::{
    attr::Attr,
    config::Config,
    control::{Changes, image_path},
    error::{Error, Result},
    inode::Node,
    ops::Fs,
    read::Data,
    stats::Report,
    view::Shows,
    why::Why,
};
