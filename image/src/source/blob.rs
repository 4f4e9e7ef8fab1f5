//! The bytes of one blob, on their way from where they are fetched to where they are unpacked.
//!
//! A task fetches and hashes, a worker thread reads: [`BlobSink`] and [`BlobReader`] are the two
//! ends of a queue bounded in bytes. Chunks pass through it as they came from the socket or the
//! file, so a byte is hashed once and, through [`std::io::BufRead`], copied not at all.

use std::{
    io::{self, BufRead, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::AbortHandle,
};

use super::error::{BlobError, SourceError};
use crate::digest::Digest;

/// Bytes of a blob that may wait between fetching and reading.
const QUEUE_BYTES: usize = 4 << 20;

/// Chunks that may wait; HTTP/2 brings small ones.
const QUEUE_CHUNKS: usize = 512;

/// Reads a blob on a worker thread, checking size and digest as it passes.
///
/// The end of the stream is reported only after size and digest were found right; otherwise
/// every read from then on fails with an [`io::Error`] that holds a [`BlobError`]. Bytes handed
/// out before are not yet vouched for: a reader that stops early, as decompressors do at the end
/// of their stream, calls [`BlobReader::finish`], which reads on to the end.
///
/// Dropping the reader stops the transfer. Reading blocks, for no longer than the deadlines of
/// the source, and panics in a thread that drives asynchronous tasks.
#[derive(Debug)]
pub struct BlobReader {
    digest: Digest,
    size: u64,
    chunks: mpsc::Receiver<Message>,
    current: Bytes,
    permit: Option<OwnedSemaphorePermit>,
    read: Arc<AtomicU64>,
    end: Option<Result<(), BlobError>>,
    task: AbortHandle,
}

#[derive(Debug)]
enum Message {
    Data(Bytes, OwnedSemaphorePermit),
    End(Result<(), BlobError>),
}

impl BlobReader {
    /// Starts `fetch` as a task of `runtime` and gives the reading end of its sink.
    pub(crate) fn spawn<F, Fut>(runtime: &Handle, digest: Digest, size: u64, fetch: F) -> Self
    where
        F: FnOnce(BlobSink) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (sender, chunks) = mpsc::channel(QUEUE_CHUNKS);
        let sink = BlobSink {
            digest,
            size,
            taken: 0,
            hasher: Sha256::new(),
            budget: Arc::new(Semaphore::new(QUEUE_BYTES)),
            sender,
        };
        let task = runtime.spawn(fetch(sink)).abort_handle();
        let read = Arc::new(AtomicU64::new(0));
        Self {
            digest,
            size,
            chunks,
            current: Bytes::new(),
            permit: None,
            read,
            end: None,
            task,
        }
    }

    /// Digest that the bytes must have.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many bytes there must be.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Count of the bytes read so far, as stored (compressed). It can be watched from anywhere.
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.read)
    }

    /// Reads what is left and gives the number of bytes of the whole blob, all of them checked.
    ///
    /// # Errors
    /// What ended the stream.
    pub fn finish(mut self) -> Result<u64, BlobError> {
        while self.next_chunk()? {
            let len = self.current.len();
            self.consume(len);
        }
        Ok(self.size)
    }

    /// Makes `current` not empty; false at the checked end.
    fn next_chunk(&mut self) -> Result<bool, BlobError> {
        while self.current.is_empty() {
            self.permit = None;
            if let Some(end) = &self.end {
                return end.clone().map(|()| false);
            }
            match self.chunks.blocking_recv() {
                Some(Message::Data(chunk, permit)) => {
                    self.current = chunk;
                    self.permit = Some(permit);
                }
                Some(Message::End(end)) => self.end = Some(end),
                None => self.end = Some(Err(BlobError::new(self.digest, SourceError::Stopped))),
            }
        }
        Ok(true)
    }
}

impl BufRead for BlobReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.next_chunk().map_err(|error| error.to_io())?;
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        let amount = amount.min(self.current.len());
        bytes::Buf::advance(&mut self.current, amount);
        self.read.fetch_add(amount as u64, Ordering::Relaxed);
    }
}

impl Read for BlobReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let chunk = self.fill_buf()?;
        let len = chunk.len().min(out.len());
        out[..len].copy_from_slice(&chunk[..len]);
        self.consume(len);
        Ok(len)
    }
}

impl Drop for BlobReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The writing end: hashes what it is given and keeps the queue bounded.
#[derive(Debug)]
pub(crate) struct BlobSink {
    digest: Digest,
    size: u64,
    taken: u64,
    hasher: Sha256,
    budget: Arc<Semaphore>,
    sender: mpsc::Sender<Message>,
}

/// The reader is gone: nobody wants the rest.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl BlobSink {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    /// Bytes taken so far.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes the next bytes; waits while the queue is full. The caller gives no more than
    /// [`Self::size`] in all.
    pub(crate) async fn push(&mut self, mut chunk: Bytes) -> Result<(), ReaderGone> {
        self.hasher.update(&chunk);
        self.taken += chunk.len() as u64;
        while !chunk.is_empty() {
            let piece = chunk.split_to(chunk.len().min(QUEUE_BYTES / 2));
            // At most half the queue, which fits into 32 bits.
            let cost = piece.len() as u32;
            let permit = Arc::clone(&self.budget).acquire_many_owned(cost).await;
            let message = Message::Data(piece, permit.map_err(|_| ReaderGone)?);
            self.sender.send(message).await.map_err(|_| ReaderGone)?;
        }
        Ok(())
    }

    /// Ends the stream after its last byte: right if size and digest are. `from` names the
    /// place the bytes came from. `wrong` is called when they were not right, before the reader hears
    /// of it and may try again.
    pub(crate) async fn finish(self, from: &str, wrong: impl FnOnce()) {
        let what = || format!("blob {} from {from}", self.digest);
        let got = Digest::from_bytes(self.hasher.finalize().into());
        let end = if self.taken != self.size {
            Err(SourceError::WrongSize {
                what: what(),
                want: self.size,
                got: self.taken,
            })
        } else if got != self.digest {
            Err(SourceError::WrongDigest {
                what: what(),
                want: self.digest,
                got,
            })
        } else {
            Ok(())
        };
        if end.is_err() {
            wrong();
        }
        let end = end.map_err(|error| BlobError::new(self.digest, error));
        // A reader that is gone needs no verdict.
        let _ = self.sender.send(Message::End(end)).await;
    }

    /// Ends the stream with an error.
    pub(crate) async fn fail(self, error: SourceError) {
        let end = Err(BlobError::new(self.digest, error));
        let _ = self.sender.send(Message::End(end)).await;
    }
}
