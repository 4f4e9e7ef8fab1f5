//! Where the members of a tar lie: one pass over its headers, bounded in entries and name lengths.
//!
//! Only what image archives need: regular files and the links that old `docker save` writes
//! between equal layers. Links are resolved among the names of the archive and nowhere else.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use tar::{EntryType, Header};

use crate::source::error::SourceError;

const BLOCK: u64 = 512;

/// Most members of an image archive. `docker save` of 127 layers has under 400.
const ENTRIES_MAX: usize = 100_000;

/// Longest name, link target or PAX header in bytes.
const EXTENSION_MAX: u64 = 64 << 10;

/// Longest chain of links.
const HOPS_MAX: usize = 8;

/// Members of a tar by normalised name; of several with one name the last counts.
#[derive(Debug)]
pub(crate) struct TarIndex {
    members: HashMap<String, Member>,
}

#[derive(Debug)]
enum Member {
    File {
        offset: u64,
        len: u64,
    },
    /// Link to another member, by its normalised name.
    Link(String),
}

impl TarIndex {
    /// Reads the headers of the tar that starts where `file` starts.
    pub(crate) fn of_file(file: &File, path: &Path) -> Result<Self, SourceError> {
        let size = file
            .metadata()
            .map_err(|e| SourceError::io(path, "read its size", e))?
            .len();
        Self::of_input(&mut FileInput { file, at: 0, size }, path)
    }

    /// Reads the headers of a tar that can be read only once. The offsets are in the stream.
    pub(crate) fn of_stream(stream: impl Read, path: &Path) -> Result<Self, SourceError> {
        Self::of_input(&mut StreamInput(stream), path)
    }

    /// Whether there is a file or link of this name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Offset and length of the file called `name`, links followed.
    pub(crate) fn find(&self, name: &str, path: &Path) -> Result<Option<(u64, u64)>, SourceError> {
        let mut name = name;
        for _ in 0..HOPS_MAX {
            match self.members.get(name) {
                None => return Ok(None),
                Some(Member::File { offset, len }) => return Ok(Some((*offset, *len))),
                Some(Member::Link(target)) => name = target,
            }
        }
        let reason = format!("more than {HOPS_MAX} links lead from one to another at {name:?}");
        Err(SourceError::archive(path, reason))
    }

    fn of_input(input: &mut dyn Input, path: &Path) -> Result<Self, SourceError> {
        let mut scan = Scan {
            input,
            path,
            at: 0,
            pending: Pending::default(),
        };
        let mut members = HashMap::new();
        while let Some((name, member)) = scan.next()? {
            if members.len() >= ENTRIES_MAX {
                let reason =
                    format!("it has more than {ENTRIES_MAX} members, too many for an image");
                return Err(SourceError::archive(path, reason));
            }
            if let Some(member) = member {
                members.insert(name, member);
            }
        }
        Ok(Self { members })
    }
}

/// What extension headers said about the member that follows them.
#[derive(Default)]
struct Pending {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

struct Scan<'a> {
    input: &'a mut dyn Input,
    path: &'a Path,
    at: u64,
    pending: Pending,
}

impl Scan<'_> {
    /// The next member; those that are neither file nor link come without a value.
    fn next(&mut self) -> Result<Option<(String, Option<Member>)>, SourceError> {
        // Extension headers before one member; each kind at most once or twice in honest tars.
        for _ in 0..16 {
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let header = Header::from_byte_slice(&block);
            let size = header
                .entry_size()
                .map_err(|_| self.bad("a member's size is no number"))?;
            match header.entry_type() {
                EntryType::GNULongName => self.pending.name = Some(self.text(size)?),
                EntryType::GNULongLink => self.pending.link = Some(self.text(size)?),
                EntryType::XHeader => self.pax(size)?,
                EntryType::XGlobalHeader => self.skip(size)?,
                EntryType::GNUSparse => return Err(self.bad("it has sparse members")),
                _ => return self.member(header, size).map(Some),
            }
        }
        Err(self.bad("it has too many extension headers in a row"))
    }

    fn member(
        &mut self,
        header: &Header,
        size: u64,
    ) -> Result<(String, Option<Member>), SourceError> {
        let pending = std::mem::take(&mut self.pending);
        let size = pending.size.unwrap_or(size);
        let name = pending
            .name
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let name = self.normal(&name, "")?;
        let link = || {
            let target = pending
                .link
                .clone()
                .or_else(|| header.link_name_bytes().map(Into::into));
            target.ok_or_else(|| self.bad("a link has no target"))
        };
        let member = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                let offset = self.at;
                self.skip(size)?;
                return Ok((name, Some(Member::File { offset, len: size })));
            }
            EntryType::Symlink => {
                let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                Some(Member::Link(self.normal(&link()?, parent)?))
            }
            EntryType::Link => Some(Member::Link(self.normal(&link()?, "")?)),
            _ => None,
        };
        self.skip(size)?;
        Ok((name, member))
    }

    /// The next header, its checksum checked; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<[u8; BLOCK as usize]>, SourceError> {
        let mut block = [0; BLOCK as usize];
        let got = self
            .input
            .fill(&mut block)
            .map_err(|e| SourceError::io(self.path, "read it", e))?;
        self.at += got as u64;
        if got == 0 || (got == block.len() && block.iter().all(|b| *b == 0)) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block);
        let sum: u32 = block[..148]
            .iter()
            .chain(&block[156..])
            .map(|b| u32::from(*b))
            .sum();
        if got < block.len() || header.cksum().ok() != Some(sum + 8 * u32::from(b' ')) {
            let reason = if self.at <= BLOCK {
                "this is not a tar archive"
            } else {
                "the tar is damaged"
            };
            return Err(self.bad(reason));
        }
        Ok(Some(block))
    }

    fn text(&mut self, size: u64) -> Result<Vec<u8>, SourceError> {
        let mut bytes = self.extension(size)?;
        if let Some(end) = bytes.iter().position(|b| *b == 0) {
            bytes.truncate(end);
        }
        Ok(bytes)
    }

    fn pax(&mut self, size: u64) -> Result<(), SourceError> {
        let bytes = self.extension(size)?;
        for record in tar::PaxExtensions::new(&bytes) {
            let record = record.map_err(|_| self.bad("a PAX header is damaged"))?;
            let value = record.value_bytes();
            match record.key_bytes() {
                b"path" => self.pending.name = Some(value.to_vec()),
                b"linkpath" => self.pending.link = Some(value.to_vec()),
                b"size" => {
                    let size = std::str::from_utf8(value)
                        .ok()
                        .and_then(|text| text.parse().ok());
                    self.pending.size =
                        Some(size.ok_or_else(|| self.bad("a PAX size is no number"))?);
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(self.bad("it has sparse members"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, SourceError> {
        if size > EXTENSION_MAX {
            return Err(self.bad("a name or PAX header in it is too long"));
        }
        let padded = size.next_multiple_of(BLOCK);
        let mut bytes = vec![0; usize::try_from(padded).unwrap_or_default()];
        let got = self
            .input
            .fill(&mut bytes)
            .map_err(|e| SourceError::io(self.path, "read it", e))?;
        if got < bytes.len() {
            return Err(self.bad("it ends in the middle of a header"));
        }
        self.at += padded;
        bytes.truncate(usize::try_from(size).unwrap_or_default());
        Ok(bytes)
    }

    fn skip(&mut self, size: u64) -> Result<(), SourceError> {
        let too_large = || self.bad("a member's size is impossible");
        let padded = size.checked_next_multiple_of(BLOCK).ok_or_else(too_large)?;
        let end = self.at.checked_add(padded).ok_or_else(too_large)?;
        // The padding of the last member may be missing, its content may not.
        let skipped = self
            .input
            .skip(padded)
            .map_err(|e| SourceError::io(self.path, "read it", e))?;
        if skipped < size {
            return Err(self.bad(
                "it ends in the middle of a member: it was cut off or is still being written",
            ));
        }
        self.at = end;
        Ok(())
    }

    /// `name`, taken relative to `base`, as components joined by single slashes.
    fn normal(&self, name: &[u8], base: &str) -> Result<String, SourceError> {
        let text =
            std::str::from_utf8(name).map_err(|_| self.bad("a member's name is not UTF-8"))?;
        let leaves = || self.bad(format!("the name {text:?} leads out of the archive"));
        if text.starts_with('/') || text.contains('\0') {
            return Err(leaves());
        }
        let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop().ok_or_else(leaves)?),
                part => parts.push(part),
            }
        }
        Ok(parts.join("/"))
    }

    fn bad(&self, reason: impl Into<String>) -> SourceError {
        SourceError::archive(self.path, reason)
    }
}

/// Where headers come from.
trait Input {
    /// Fills `out` as far as there is data; gives how far.
    fn fill(&mut self, out: &mut [u8]) -> io::Result<usize>;
    /// Passes over up to `len` bytes; gives how many there were.
    fn skip(&mut self, len: u64) -> io::Result<u64>;
}

struct FileInput<'a> {
    file: &'a File,
    at: u64,
    size: u64,
}

impl Input for FileInput<'_> {
    fn fill(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = out.len().min(left);
        self.file.read_exact_at(&mut out[..len], self.at)?;
        self.at += len as u64;
        Ok(len)
    }

    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let len = len.min(self.size.saturating_sub(self.at));
        self.at += len;
        Ok(len)
    }
}

struct StreamInput<R>(R);

impl<R: Read> Input for StreamInput<R> {
    fn fill(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < out.len() {
            match self.0.read(&mut out[filled..]) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn skip(&mut self, len: u64) -> io::Result<u64> {
        io::copy(&mut self.0.by_ref().take(len), &mut io::sink())
    }
}
