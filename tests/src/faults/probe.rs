//! Readers that time every single read and compare every byte.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use super::{image::Content, plan::Dice};

/// Lengths of reads.
const LENS: [usize; 4] = [4 << 10, 16 << 10, 128 << 10, 256 << 10];
/// Reads begin on such a border.
const ALIGN: u64 = 4 << 10;
/// Between two reads of one prober.
const PAUSE: Duration = Duration::from_millis(4);

/// How a door's reads are made to reach the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// With O_DIRECT.
    Direct,
    /// By dropping the file's pages first.
    Dropped,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Probed {
    /// Reads.
    pub(super) reads: u64,
    /// The longest of them.
    pub(super) longest: Duration,
    /// Where that was.
    pub(super) at: String,
}

impl Probed {
    /// Both together.
    pub(super) fn and(self, other: Self) -> Self {
        let reads = self.reads + other.reads;
        let longer = if self.longest >= other.longest {
            self
        } else {
            other
        };
        Self { reads, ..longer }
    }
}

/// A thread that reads until it is told to end, or until something is wrong.
#[derive(Debug)]
pub(super) struct Prober {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Probed>>,
}

impl Prober {
    /// Starts one on files of the tree at `root`, those of `content` that are there.
    pub(super) fn start(root: PathBuf, past: Past, content: &Content, seed: u64) -> Result<Self> {
        let files = Files::open(&root, past, content)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("prober".into())
            .spawn(move || files.read(&stopped, seed))?;
        Ok(Self { stop, thread })
    }

    /// Ends it; an error when a read failed or gave other bytes.
    pub(super) fn end(self) -> Result<Probed> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("a prober panicked"))?
    }
}

struct Files {
    content: Content,
    past: Past,
    open: Vec<(String, PathBuf, File)>,
}

impl Files {
    fn open(root: &Path, past: Past, content: &Content) -> Result<Self> {
        let mut open = Vec::new();
        for name in content.files.keys() {
            let path = root.join(name);
            let mut options = File::options();
            options.read(true);
            if past == Past::Direct {
                options.custom_flags(OFlag::O_DIRECT.bits());
            }
            match options.open(&path) {
                Ok(file) => open.push((name.clone(), path, file)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).context(path.display().to_string()),
            }
        }
        ensure!(!open.is_empty(), "no files below {}", root.display());
        Ok(Self {
            content: content.clone(),
            past,
            open,
        })
    }

    fn read(&self, stopped: &AtomicBool, seed: u64) -> Result<Probed> {
        let mut dice = Dice::new(seed);
        let mut probed = Probed::default();
        let mut buffer = vec![0; LENS.iter().copied().max().unwrap_or(0)];
        while !stopped.load(Ordering::Relaxed) {
            // Both numbers are those of small lists.
            let (name, path, file) = &self.open[dice.below(self.open.len() as u64) as usize];
            let want = LENS[dice.below(LENS.len() as u64) as usize];
            let bytes = &self.content.files[name];
            let offset = dice.below(bytes.len() as u64) / ALIGN * ALIGN;
            let right = &bytes[offset as usize..];
            let right = &right[..right.len().min(want)];
            if self.past == Past::Dropped {
                posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
            let what = || format!("{} bytes at {offset} of {}", right.len(), path.display());
            let began = Instant::now();
            let read = file.read_exact_at(&mut buffer[..right.len()], offset);
            let took = began.elapsed();
            read.with_context(|| format!("{} after {took:?}", what()))?;
            ensure!(buffer[..right.len()] == *right, "other bytes: {}", what());
            probed.reads += 1;
            if took > probed.longest {
                (probed.longest, probed.at) = (took, what());
            }
            thread::sleep(PAUSE);
        }
        Ok(probed)
    }
}
