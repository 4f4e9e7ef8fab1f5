//! Progress of a pull: a bar for each layer on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use harbour_image::manifest::LayerDescriptor;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{cli, ingest::IngestError, size::Size};

/// Told what a pull does.
pub trait PullProgress: Send + Sync {
    /// The manifest of `what` is being fetched.
    fn resolving(&self, what: &str);
    /// A layer is in the pool already.
    fn present(&self, layer: &LayerDescriptor);
    /// A layer will be fetched.
    fn layer(&self, layer: &LayerDescriptor) -> Arc<dyn LayerProgress>;
    /// Nothing more comes.
    fn finished(&self);
}

/// Told what happens to one layer.
pub trait LayerProgress: Send + Sync {
    /// Transfer began; `done` counts compressed bytes as they come.
    fn started(&self, total: u64, done: Arc<AtomicU64>);
    /// All bytes came; the index is being written.
    fn indexing(&self);
    /// The layer is staged; `new_bytes` of it were new to the pool.
    fn done(&self, new_bytes: u64);
    /// Another pull fetches it, on `host`, and has come so far; `total` is 0 when it has not said.
    fn elsewhere(&self, host: &str, done: u64, total: u64);
    /// Another pull has put it into the pool.
    fn arrived(&self);
    /// It failed.
    fn failed(&self, error: &IngestError);
}

/// The display that `wanted` asks for on this standard error.
pub fn display(wanted: cli::Progress) -> Arc<dyn PullProgress> {
    match wanted {
        cli::Progress::None => Arc::new(Silent),
        cli::Progress::Auto if std::io::stderr().is_terminal() => Arc::new(Bars::new()),
        _ => Arc::new(Lines),
    }
}

/// Shows nothing.
pub struct Silent;

impl PullProgress for Silent {
    fn resolving(&self, _what: &str) {}
    fn present(&self, _layer: &LayerDescriptor) {}
    fn layer(&self, _layer: &LayerDescriptor) -> Arc<dyn LayerProgress> {
        Arc::new(Silent)
    }
    fn finished(&self) {}
}

impl LayerProgress for Silent {
    fn started(&self, _total: u64, _done: Arc<AtomicU64>) {}
    fn indexing(&self) {}
    fn done(&self, _new_bytes: u64) {}
    fn elsewhere(&self, _host: &str, _done: u64, _total: u64) {}
    fn arrived(&self) {}
    fn failed(&self, _error: &IngestError) {}
}

/// One line for each thing that happens.
struct Lines;

struct Line {
    name: String,
    begun: Mutex<Option<(Instant, u64)>>,
    told: Mutex<Option<Told>>,
}

/// What was said last of a layer that another pull fetches.
struct Told {
    at: Instant,
    host: String,
    total: u64,
}

/// Lines about one transfer elsewhere are not closer than this.
const LINE_EVERY: Duration = Duration::from_secs(2);

impl PullProgress for Lines {
    fn resolving(&self, what: &str) {
        eprintln!("{what}: resolving");
    }

    fn present(&self, layer: &LayerDescriptor) {
        eprintln!("{}: already in the pool", layer.digest.short());
    }

    fn layer(&self, layer: &LayerDescriptor) -> Arc<dyn LayerProgress> {
        Arc::new(Line {
            name: layer.digest.short(),
            begun: Mutex::new(None),
            told: Mutex::new(None),
        })
    }

    fn finished(&self) {}
}

impl LayerProgress for Line {
    fn started(&self, total: u64, _done: Arc<AtomicU64>) {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), total));
        eprintln!("{}: fetching {}", self.name, Size(total));
    }

    fn indexing(&self) {}

    fn done(&self, new_bytes: u64) {
        let begun = *self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let took = begun.map_or(0.0, |(at, _)| at.elapsed().as_secs_f64());
        eprintln!(
            "{}: unpacked in {took:.2} s, {} new in the pool",
            self.name,
            Size(new_bytes)
        );
    }

    fn elsewhere(&self, host: &str, done: u64, total: u64) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        // Another holder is news, and so are the first figures.
        let news = told
            .as_ref()
            .is_none_or(|told| told.host != host || (told.total == 0 && total > 0));
        let due = |told: &Told| total > 0 && told.at.elapsed() >= LINE_EVERY;
        if !news && !told.as_ref().is_some_and(due) {
            return;
        }
        *told = Some(Told {
            at: Instant::now(),
            host: host.to_owned(),
            total,
        });
        match total {
            0 => eprintln!("{}: fetched by {host}", self.name),
            _ => eprintln!(
                "{}: fetched by {host}, {} of {}",
                self.name,
                Size(done),
                Size(total)
            ),
        }
    }

    fn arrived(&self) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match told.as_ref() {
            Some(told) => eprintln!("{}: in the pool, by {}", self.name, told.host),
            None => eprintln!("{}: in the pool, by another pull", self.name),
        }
    }

    fn failed(&self, error: &IngestError) {
        if !matches!(error, IngestError::Cancelled) {
            eprintln!("{}: failed: {error}", self.name);
        }
    }
}

/// A bar for each layer.
struct Bars {
    bars: MultiProgress,
}

struct Bar {
    bar: ProgressBar,
    watched: Mutex<Option<Arc<AtomicU64>>>,
    /// Host of the pull that fetches it instead of this one.
    elsewhere: Mutex<Option<String>>,
}

impl Bars {
    fn new() -> Self {
        Self {
            bars: MultiProgress::new(),
        }
    }

    fn add(&self, layer: &LayerDescriptor) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(layer.size.max(1)));
        bar.set_prefix(layer.digest.short());
        bar
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl PullProgress for Bars {
    fn resolving(&self, what: &str) {
        let _ = self.bars.println(what);
    }

    fn present(&self, layer: &LayerDescriptor) {
        let bar = self.add(layer);
        bar.set_style(style("{prefix}  already in the pool"));
        bar.finish();
    }

    fn layer(&self, layer: &LayerDescriptor) -> Arc<dyn LayerProgress> {
        let bar = self.add(layer);
        bar.set_style(style("{prefix}  waiting"));
        bar.tick();
        Arc::new(Bar {
            bar,
            watched: Mutex::new(None),
            elsewhere: Mutex::new(None),
        })
    }

    fn finished(&self) {}
}

impl LayerProgress for Bar {
    fn started(&self, _total: u64, done: Arc<AtomicU64>) {
        self.bar.set_style(style(
            "{prefix}  [{bar:30}] {bytes:>10} / {total_bytes:10} {bytes_per_sec:>12}  {eta:>4}",
        ));
        self.bar.reset_elapsed();
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&done));
        let bar = self.bar.clone();
        let _ = std::thread::Builder::new()
            .name("bar".into())
            .spawn(move || {
                // The count is the reader's; ours is only to look at it ten times a second.
                while !bar.is_finished() && Arc::strong_count(&done) > 1 {
                    bar.set_position(done.load(Ordering::Relaxed));
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
    }

    fn indexing(&self) {
        self.bar.set_position(self.bar.length().unwrap_or(0));
        self.bar.set_style(style("{prefix}  indexing"));
    }

    fn done(&self, new_bytes: u64) {
        self.watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.bar
            .set_style(style("{prefix}  done in {elapsed}  {msg}"));
        self.bar
            .finish_with_message(format!("{} new", Size(new_bytes)));
    }

    fn elsewhere(&self, host: &str, done: u64, total: u64) {
        let mut elsewhere = self
            .elsewhere
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if elsewhere.as_deref() != Some(host) {
            *elsewhere = Some(host.to_owned());
            self.bar.set_style(style(
                "{prefix}  [{bar:30}] {bytes:>10} / {total_bytes:10} {bytes_per_sec:>12}  {eta:>4}  by {msg}",
            ));
            self.bar.set_message(host.to_owned());
            self.bar.reset_elapsed();
        }
        if total > 0 {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    fn arrived(&self) {
        let elsewhere = self
            .elsewhere
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let by = elsewhere.clone().unwrap_or_else(|| "another pull".into());
        self.bar.set_style(style("{prefix}  in the pool, by {msg}"));
        self.bar.finish_with_message(by);
    }

    fn failed(&self, error: &IngestError) {
        self.watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.bar.set_style(style("{prefix}  {msg}"));
        self.bar.abandon_with_message(match error {
            IngestError::Cancelled => "stopped".to_owned(),
            other => format!("failed: {other}"),
        });
    }
}
