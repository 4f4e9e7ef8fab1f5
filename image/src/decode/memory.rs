//! A sink that keeps objects in memory: for tests, fuzzing and benches.

use crate::{
    object::OBJECT_MAX,
    tree::{Content, ObjectKey, ObjectSink},
};

/// Keeps every object that it is given, up to a number of bytes.
#[derive(Clone, Debug)]
pub struct MemorySink {
    objects: Vec<Vec<u8>>,
    bytes: usize,
    bytes_max: usize,
}

/// Why [`MemorySink`] did not take an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemorySinkError {
    /// More than the sink was made for.
    #[error("the objects take more than {0} bytes")]
    Full(usize),
    /// Empty, or longer than [`OBJECT_MAX`]: the decoder has a bug.
    #[error("an object of {0} bytes")]
    Length(usize),
}

impl MemorySink {
    /// A sink without a bound.
    pub fn new() -> Self {
        Self::with_bytes_max(usize::MAX)
    }

    /// A sink that takes no more than `bytes_max` bytes.
    pub fn with_bytes_max(bytes_max: usize) -> Self {
        Self {
            objects: Vec::new(),
            bytes: 0,
            bytes_max,
        }
    }

    /// The object behind `key`, if this sink gave it.
    pub fn object(&self, key: ObjectKey) -> Option<&[u8]> {
        self.objects.get(key.0 as usize).map(Vec::as_slice)
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// All bytes of a file, holes as zeros. Takes as much memory as the file is long; see
    /// [`MemorySink::read_at`] for large ones.
    ///
    /// # Panics
    /// When `content` is of another sink.
    pub fn content(&self, content: &Content) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(content.size).unwrap_or(usize::MAX)];
        self.read_at(content, 0, &mut bytes);
        bytes
    }

    /// Fills `into` with the file's bytes from `offset` on, holes and what is behind the end as
    /// zeros.
    ///
    /// # Panics
    /// When `content` is of another sink.
    pub fn read_at(&self, content: &Content, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let until = offset.saturating_add(into.len() as u64);
        let first = content
            .runs
            .partition_point(|run| run.offset + u64::from(run.len) <= offset);
        for run in content.runs[first..]
            .iter()
            .take_while(|run| run.offset < until)
        {
            let bytes = &self.objects[run.object.0 as usize];
            let from = run.offset.max(offset);
            let to = (run.offset + u64::from(run.len)).min(until);
            into[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&bytes[(from - run.offset) as usize..(to - run.offset) as usize]);
        }
    }
}

impl Default for MemorySink {
    fn default() -> Self {
        Self::new()
    }
}

impl ObjectSink for MemorySink {
    type Error = MemorySinkError;

    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, Self::Error> {
        if bytes.is_empty() || bytes.len() > OBJECT_MAX {
            return Err(MemorySinkError::Length(bytes.len()));
        }
        let full = MemorySinkError::Full(self.bytes_max);
        let key = u32::try_from(self.objects.len()).map_err(|_| full)?;
        self.bytes = self.bytes.checked_add(bytes.len()).ok_or(full)?;
        if self.bytes > self.bytes_max {
            return Err(full);
        }
        self.objects.push(bytes.to_vec());
        Ok(ObjectKey(key))
    }
}
