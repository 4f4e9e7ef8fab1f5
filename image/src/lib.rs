//! Images as data: where they come from, what a layer holds, and how that is written down.
//!
//! The path of one layer through this room: [`source`] gives its bytes, [`decode`] turns the tar
//! stream into a [`tree::Tree`] while handing file content, object by object, to an
//! [`tree::ObjectSink`], and [`index`] writes tree and object placement as one flat file that the
//! kernel's EROFS, `fsck.erofs` and our own reader understand.
//!
//! Nothing here knows a pool, a metadata daemon or FUSE.
#![forbid(unsafe_code)]

pub mod decode;
pub mod digest;
pub mod index;
pub mod manifest;
pub mod object;
pub mod reference;
pub mod source;
pub mod tree;
