//! Reading an extended attribute of a path.

use std::{io, path::Path};

/// The value of `name` on the file at `path`, following no final link.
pub fn get(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    xattr::get(path, name)?.ok_or_else(|| io::Error::other("it has no such attribute"))
}
