//! The one place where an error becomes a number, a log line and a count.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::errno::Errno;

use crate::{error::Error, inode::Node};

/// What a program sees for `error`.
pub const fn errno(error: &Error) -> Errno {
    match error {
        Error::NotFound => Errno::ENOENT,
        // As NFS does: the path may well work when it is looked up again.
        Error::Stale(_) => Errno::ESTALE,
        Error::NotDir(_) => Errno::ENOTDIR,
        Error::IsDir(_) => Errno::EISDIR,
        // What readlink(2) says for no link, and read(2) for what cannot be read.
        Error::WrongType(_) => Errno::EINVAL,
        Error::NameTooLong(_) => Errno::ENAMETOOLONG,
        Error::NoAttribute => Errno::ENODATA,
        Error::SmallBuffer(_) => Errno::ERANGE,
        Error::NoData => Errno::ENXIO,
        Error::ReadOnly => Errno::EROFS,
        // Should not get here. EAGAIN would make programs spin, so it is a failure like others.
        Error::Later => Errno::EIO,
        // EUCLEAN would be truer for a wrong index, but programs know EIO.
        Error::Index { .. }
        | Error::Unreadable { .. }
        | Error::Misplaced { .. }
        | Error::Document { .. }
        | Error::WrongDocument(_) => Errno::EIO,
    }
}

/// Counts errors by number and logs those that are nobody's question but somebody's fault.
#[derive(Debug, Default)]
pub struct Errors {
    /// EIO.
    failed: AtomicU64,
    /// Everything else but ENOENT and ENODATA, which are ordinary answers.
    refused: AtomicU64,
}

impl Errors {
    /// Counts and logs `error` of operation `name` on `node`; gives what the kernel is told.
    pub fn report(&self, name: &'static str, node: Node, error: &Error) -> Errno {
        let number = errno(error);
        match number {
            Errno::ENOENT | Errno::ENODATA => {}
            Errno::EIO => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::error!(op = name, ?node, "{}", chain(error));
            }
            _ => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(op = name, ?node, %error, errno = number as i32);
            }
        }
        number
    }

    /// Operations that ended with EIO.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Operations that were refused with another error that is not an ordinary answer.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// An error and its sources on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use harbour_image::digest::Digest;

    use super::*;
    use crate::source::SourceError;

    #[test]
    fn errors_have_the_numbers_that_programs_expect_and_are_counted() {
        let node = Node::ROOT;
        let table = [
            (Error::NotFound, Errno::ENOENT, 0, 0),
            (Error::NoAttribute, Errno::ENODATA, 0, 0),
            (Error::Stale(node), Errno::ESTALE, 0, 1),
            (Error::NotDir(node), Errno::ENOTDIR, 0, 1),
            (Error::IsDir(node), Errno::EISDIR, 0, 1),
            (Error::WrongType(node), Errno::EINVAL, 0, 1),
            (Error::NameTooLong(300), Errno::ENAMETOOLONG, 0, 1),
            (Error::SmallBuffer(10), Errno::ERANGE, 0, 1),
            (Error::NoData, Errno::ENXIO, 0, 1),
            (Error::ReadOnly, Errno::EROFS, 0, 1),
            (Error::Later, Errno::EIO, 1, 0),
            (Error::WrongDocument(Digest::of(b"")), Errno::EIO, 1, 0),
            (
                Error::Unreadable {
                    what: "x".into(),
                    tried: String::new(),
                },
                Errno::EIO,
                1,
                0,
            ),
            (
                Error::Misplaced {
                    what: "x".into(),
                    reason: "y",
                },
                Errno::EIO,
                1,
                0,
            ),
        ];
        for (error, number, failed, refused) in table {
            let errors = Errors::default();
            assert_eq!(errors.report("test", node, &error), number, "{error}");
            assert_eq!(
                (errors.failed(), errors.refused()),
                (failed, refused),
                "{error}"
            );
        }
    }

    #[test]
    fn a_log_line_tells_each_cause_once() {
        let digest = Digest::of(b"");
        let error = Error::Document {
            digest,
            source: SourceError::Gone("it".into()),
        };
        assert_eq!(
            chain(&error),
            format!("document {digest} cannot be read: it is not in the catalogue")
        );
    }
}
