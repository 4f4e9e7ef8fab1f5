//! From a blob to tar bytes: one thread reads and decompresses, the caller's thread hashes and
//! parses. A few buffers go round between the two, so neither gets far ahead of the other.

use std::{
    io::{self, Read},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use sha2::{Digest as _, Sha256};
use zstd::stream::raw::{DParameter, Decoder as ZstdDecoder, InBuffer, Operation, OutBuffer};

use super::{
    Compression, DecodeError, DecodeLimits, DecodeOptions, DecodeStats, Decoded, Limit,
    error::DecodeErrorKind as Kind, gzip::Gunzip, layer::Fault,
};
use crate::{digest::Digest, tree::Tree};

/// Bytes of tar stream in one buffer: fits a core's second-level cache, and is large enough that
/// handing it over costs nothing beside inflating it.
const CHUNK: usize = 256 << 10;

/// Buffers filled ahead of the parser.
const CHUNKS_AHEAD: usize = 3;

/// Bytes of blob read at once.
const BLOB_BUFFER: usize = 128 << 10;

/// Size of everything in a tar stream.
pub(super) const BLOCK: usize = 512;

/// What one call of [`Inflate::step`] did.
pub(super) struct Step {
    /// Input bytes taken.
    pub(super) used: usize,
    /// Output bytes written.
    pub(super) made: usize,
}

/// A decompressor that is fed and drained in pieces.
pub(super) trait Inflate: Send {
    /// Takes from `input`, writes to the start of `output`. Neither used nor made anything means
    /// that more input is needed.
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, String>;

    /// Whether the input may end here.
    fn finish(&self) -> Result<(), String>;

    /// Name of the format, for errors.
    fn format(&self) -> &'static str;
}

struct Unzstd {
    decoder: ZstdDecoder<'static>,
    /// At a frame's end, and at least one was there.
    between_frames: bool,
}

impl Unzstd {
    fn new(limits: &DecodeLimits) -> io::Result<Self> {
        let mut decoder = ZstdDecoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(limits.zstd_window_log_max))?;
        Ok(Self {
            decoder,
            between_frames: false,
        })
    }
}

impl Inflate for Unzstd {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, String> {
        if self.between_frames {
            if input.is_empty() {
                return Ok(Step { used: 0, made: 0 });
            }
            self.decoder.reinit().map_err(|error| error.to_string())?;
            self.between_frames = false;
        }
        let (mut from, mut to) = (InBuffer::around(input), OutBuffer::around(output));
        let hint = self
            .decoder
            .run(&mut from, &mut to)
            .map_err(|error| error.to_string())?;
        self.between_frames = hint == 0;
        Ok(Step {
            used: from.pos(),
            made: to.pos(),
        })
    }

    fn finish(&self) -> Result<(), String> {
        if self.between_frames {
            return Ok(());
        }
        Err("the stream ends in the middle of a frame".to_owned())
    }

    fn format(&self) -> &'static str {
        "zstd"
    }
}

/// A buffer of tar bytes; an empty one is the end of the stream.
struct Chunk {
    bytes: Vec<u8>,
    /// Bytes of blob read when this chunk was full.
    blob_bytes: u64,
}

type Message = Result<Chunk, Kind>;

/// Decompresses `blob` on a thread, runs `parse` over the tar stream here, then drains what is
/// left of the stream and checks the diff ID.
pub(super) fn with_tar_stream<R, F>(
    blob: R,
    options: &DecodeOptions,
    parse: F,
) -> Result<Decoded, DecodeError>
where
    R: Read + Send,
    F: FnOnce(&mut TarStream<'_>) -> Result<(Tree, DecodeStats), Fault>,
{
    let result = std::thread::scope(|scope| {
        let (full, chunks) = sync_channel::<Message>(CHUNKS_AHEAD);
        let (recycle, empty) = sync_channel(CHUNKS_AHEAD);
        let worker = std::thread::Builder::new()
            .name("layer-inflate".to_owned())
            .spawn_scoped(scope, move || {
                let mut filler = Filler {
                    blob,
                    blob_bytes: 0,
                    full,
                    empty,
                };
                if let Err(kind) = filler.run(options) {
                    // The parser may be gone: it found the tar bad.
                    let _ = filler.full.send(Err(kind));
                }
            })
            .map_err(Kind::Thread)?;
        let result = parse_all(
            TarStream::new(chunks, recycle, &options.limits),
            options,
            parse,
        );
        // The stream is gone by now, so the thread does not wait for it.
        match worker.join() {
            Ok(()) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    result.map_err(|fault: Fault| DecodeError::new(&options.label, fault.entry, fault.kind))
}

fn parse_all<F>(mut tar: TarStream<'_>, options: &DecodeOptions, parse: F) -> Result<Decoded, Fault>
where
    F: FnOnce(&mut TarStream<'_>) -> Result<(Tree, DecodeStats), Fault>,
{
    let (tree, stats) = parse(&mut tar)?;
    tar.finish(tree, stats, options.diff_id)
        .map_err(Fault::from)
}

/// The decompressing side.
struct Filler<R> {
    blob: R,
    blob_bytes: u64,
    full: SyncSender<Message>,
    empty: Receiver<Vec<u8>>,
}

impl<R: Read> Filler<R> {
    fn run(&mut self, options: &DecodeOptions) -> Result<(), Kind> {
        match options.compression {
            Compression::None => self.copy(),
            Compression::Gzip => self.inflate(&mut Gunzip::new()),
            Compression::Zstd => {
                self.inflate(&mut Unzstd::new(&options.limits).map_err(Kind::Thread)?)
            }
        }
    }

    fn copy(&mut self) -> Result<(), Kind> {
        loop {
            let mut bytes = self.buffer();
            let mut filled = 0;
            while filled < CHUNK {
                match self.read(&mut bytes[filled..])? {
                    0 => break,
                    count => filled += count,
                }
            }
            if !self.hand_over(bytes, filled) || filled == 0 {
                return Ok(());
            }
        }
    }

    fn inflate(&mut self, inflate: &mut dyn Inflate) -> Result<(), Kind> {
        let mut input = vec![0; BLOB_BUFFER];
        let (mut from, mut until) = (0, 0);
        let mut output = self.buffer();
        let mut filled = 0;
        loop {
            let step = inflate
                .step(&input[from..until], &mut output[filled..])
                .map_err(|reason| self.compressed_fault(inflate.format(), reason))?;
            from += step.used;
            filled += step.made;
            if filled == CHUNK {
                if !self.hand_over(output, filled) {
                    return Ok(());
                }
                output = self.buffer();
                filled = 0;
            } else if step.used == 0 && step.made == 0 {
                if from < until {
                    let reason = "the stream does not go on".to_owned();
                    return Err(self.compressed_fault(inflate.format(), reason));
                }
                (from, until) = (0, self.read(&mut input)?);
                if until == 0 {
                    break;
                }
            }
        }
        inflate
            .finish()
            .map_err(|reason| self.compressed_fault(inflate.format(), reason))?;
        if filled > 0 && !self.hand_over(output, filled) {
            return Ok(());
        }
        self.hand_over(Vec::new(), 0);
        Ok(())
    }

    fn compressed_fault(&self, format: &'static str, reason: String) -> Kind {
        Kind::Compressed {
            format,
            at: self.blob_bytes,
            reason,
        }
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, Kind> {
        loop {
            match self.blob.read(into) {
                Ok(count) => {
                    self.blob_bytes += count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Kind::Read(error)),
            }
        }
    }

    /// A buffer of [`CHUNK`] bytes, used before if there is one.
    fn buffer(&self) -> Vec<u8> {
        let mut bytes = self.empty.try_recv().unwrap_or_default();
        bytes.resize(CHUNK, 0);
        bytes
    }

    /// False when the parser has stopped listening.
    fn hand_over(&self, mut bytes: Vec<u8>, filled: usize) -> bool {
        bytes.truncate(filled);
        self.full
            .send(Ok(Chunk {
                bytes,
                blob_bytes: self.blob_bytes,
            }))
            .is_ok()
    }
}

/// The parsing side: tar bytes in order, hashed and counted on their way.
pub(super) struct TarStream<'a> {
    chunks: Receiver<Message>,
    recycle: SyncSender<Vec<u8>>,
    limits: &'a DecodeLimits,
    chunk: Vec<u8>,
    /// Bytes of `chunk` already taken.
    taken: usize,
    /// Bytes taken of the whole stream.
    position: u64,
    /// Bytes received of the whole stream.
    received: u64,
    blob_bytes: u64,
    ended: bool,
    hasher: Sha256,
    /// Bytes taken since [`Self::record`], when they are wanted.
    record: Option<Vec<u8>>,
}

impl<'a> TarStream<'a> {
    fn new(
        chunks: Receiver<Message>,
        recycle: SyncSender<Vec<u8>>,
        limits: &'a DecodeLimits,
    ) -> Self {
        Self {
            chunks,
            recycle,
            limits,
            chunk: Vec::new(),
            taken: 0,
            position: 0,
            received: 0,
            blob_bytes: 0,
            ended: false,
            hasher: Sha256::new(),
            record: None,
        }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Keeps what is taken from here on, for [`Self::recorded`].
    pub(super) fn record(&mut self) {
        self.record = Some(Vec::new());
    }

    /// What was taken since [`Self::record`]; from here on nothing is kept.
    pub(super) fn recorded(&mut self) -> Vec<u8> {
        self.record.take().unwrap_or_default()
    }

    /// As many bytes as the current chunk still has, whatever they are; nothing at the end of the stream.
    pub(super) fn rest(&mut self) -> Result<Option<&[u8]>, Kind> {
        if !self.fill()? {
            return Ok(None);
        }
        self.piece(usize::MAX, "the end").map(Some)
    }

    /// The next block of 512 bytes, or nothing at the end of the stream.
    pub(super) fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Kind> {
        if !self.fill()? {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        self.read_exact(&mut block, "a header")?;
        Ok(Some(block))
    }

    /// Fills `into`; `inside` says what an early end would cut.
    pub(super) fn read_exact(&mut self, into: &mut [u8], inside: &'static str) -> Result<(), Kind> {
        let mut filled = 0;
        while filled < into.len() {
            let piece = self.piece(into.len() - filled, inside)?;
            into[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
        }
        Ok(())
    }

    /// Passes over `count` bytes.
    pub(super) fn skip(&mut self, mut count: u64, inside: &'static str) -> Result<(), Kind> {
        while count > 0 {
            let max = usize::try_from(count).unwrap_or(usize::MAX);
            count -= self.piece(max, inside)?.len() as u64;
        }
        Ok(())
    }

    /// Exactly `count` bytes in one piece, when the current chunk holds them all.
    pub(super) fn contiguous(&mut self, count: usize) -> Result<Option<&[u8]>, Kind> {
        if !self.fill()? || self.chunk.len() - self.taken < count {
            return Ok(None);
        }
        let from = self.taken;
        self.taken += count;
        self.position += count as u64;
        Ok(Some(&self.chunk[from..self.taken]))
    }

    /// One to `max` bytes, as many as the current chunk still has.
    pub(super) fn piece(&mut self, max: usize, inside: &'static str) -> Result<&[u8], Kind> {
        if !self.fill()? {
            return Err(Kind::Truncated {
                at: self.position,
                inside,
            });
        }
        let from = self.taken;
        let count = max.min(self.chunk.len() - from);
        self.taken += count;
        self.position += count as u64;
        if let Some(record) = &mut self.record {
            record.extend_from_slice(&self.chunk[from..from + count]);
        }
        Ok(&self.chunk[from..from + count])
    }

    /// Makes sure that the chunk has bytes left; false at the end of the stream.
    fn fill(&mut self) -> Result<bool, Kind> {
        if self.taken < self.chunk.len() {
            return Ok(true);
        }
        if self.ended {
            return Ok(false);
        }
        let next = match self.chunks.recv() {
            Ok(message) => message?,
            Err(error) => return Err(Kind::Thread(io::Error::other(error))),
        };
        // The other side is gone once it has sent everything; then nobody wants the buffer.
        let _ = self
            .recycle
            .send(std::mem::replace(&mut self.chunk, next.bytes));
        self.taken = 0;
        self.blob_bytes = next.blob_bytes;
        self.ended = self.chunk.is_empty();
        self.received += self.chunk.len() as u64;
        if self.received > self.limits.tar_bytes_max {
            return Err(Kind::limit(Limit::TarBytes, self.limits.tar_bytes_max));
        }
        self.check_ratio(self.received)?;
        self.hasher.update(&self.chunk);
        Ok(!self.ended)
    }

    /// Whether `unpacked` bytes are too many to have come of the blob read so far.
    pub(super) fn check_ratio(&self, unpacked: u64) -> Result<(), Kind> {
        let allowed = self.blob_bytes.saturating_mul(self.limits.ratio_max);
        if unpacked > self.limits.ratio_free_bytes && unpacked > allowed {
            let (blob, max) = (self.blob_bytes, self.limits.ratio_max);
            return Err(Kind::Bomb {
                blob,
                unpacked,
                max,
            });
        }
        Ok(())
    }

    /// Reads what follows the end-of-archive blocks and closes the account.
    fn finish(
        mut self,
        tree: Tree,
        mut stats: DecodeStats,
        want: Option<Digest>,
    ) -> Result<Decoded, Kind> {
        while self.fill()? {
            self.taken = self.chunk.len();
        }
        stats.blob_bytes = self.blob_bytes;
        stats.tar_bytes = self.received;
        let got = Digest::from_bytes(self.hasher.finalize().into());
        match want {
            Some(want) if want != got => Err(Kind::DiffId { want, got }),
            _ => Ok(Decoded {
                tree,
                diff_id: got,
                stats,
            }),
        }
    }
}
