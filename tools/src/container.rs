//! Containers of images that this host's mount shows, for people without an engine.
//!
//! [`image`] finds an image below the mount, [`overlay`] puts a writable layer on top of it, [`spec`] makes
//! the OCI runtime's configuration of the image's own, and [`home`] is where all of that lies on this
//! host. A runtime (runc, crun) does the rest. Nothing here needs metad: what is mounted is enough.

pub mod home;
pub mod image;
pub mod overlay;
pub mod rootless;
pub mod spec;
pub mod user;
