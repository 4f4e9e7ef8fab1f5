//! Twice as much as the pool holds, pulled, read, removed and pulled again from a real registry for
//! as long as is asked for: no wrong byte and no failed read, what is evicted is counted where
//! Prometheus looks, and metad's books equal a full recount, meanwhile and at the end.
//!
//! `HARBOUR_SOAK_S=600 tests/run soak` is the long version, in seconds; `HARBOUR_SOAK_SEED` gives
//! other choices of what is pulled, read and removed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use harbour_tests::{
    beside::Donor,
    cluster::{Cluster, Pulled, short},
    faults::plan::Dice,
    layers::{Blob, Entry, Layout, noise, tar},
    registry::Registry,
    setting, shell, web,
};

/// Memory of each of three donors.
const LEND: &str = "64MiB";
/// Images, each with a layer of its own and one that it shares with others of its family.
const IMAGES: usize = 28;
/// Images of one family.
const FAMILY: usize = 4;
/// The large file of each layer: all layers together are twice what is lent.
const LARGE: usize = 10_500_000;
/// Small files of each layer, and the length of the longest.
const SMALL: usize = 24;
const SMALL_LEN: usize = 60_000;
/// Bytes of one read.
const READ: usize = 1 << 20;
/// How long it takes when nothing is said.
const LASTS_S: u64 = 30;
const SEED: u64 = 1;
const PULLERS: u64 = 2;
const READERS: u64 = 3;
/// Of so many pulls one removes the image first.
const REMOVE: u64 = 4;
/// Reads of a stretch of a file between two choices of an image.
const READS: u64 = 40;
/// One pull, on a machine that reads and evicts at the same time.
const PULL_LIMIT: Duration = Duration::from_secs(120);
/// Between two recounts on the live cluster.
const AUDIT_EVERY: Duration = Duration::from_secs(3);
/// The page cache is emptied so often, else readers would not come to the pool.
const DROP_EVERY: Duration = Duration::from_millis(700);
/// Until leases have run out and readers have acknowledged what was removed.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// Files of one layer by path.
type Files = Vec<(String, Vec<u8>)>;

/// An image, what is in it, and where it is to be read while it is there: who removes it waits for
/// whoever reads it.
struct Image {
    tag: String,
    layers: [Arc<Files>; 2],
    shown: RwLock<Vec<PathBuf>>,
    /// Held by whoever pulls or removes it.
    busy: Mutex<()>,
}

impl Image {
    fn show(&self, places: Vec<PathBuf>) {
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = places;
    }
}

/// What everybody works on.
struct Soak {
    cluster: Cluster,
    registry: Registry,
    images: Vec<Image>,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    longest_us: AtomicU64,
    pulls: AtomicU64,
    /// Pulls that found no room: all that there was, was being read or written.
    refused: AtomicU64,
    removals: AtomicU64,
    metrics: u16,
    stopped: AtomicBool,
}

fn files(seed: u64) -> Arc<Files> {
    let large = noise(seed, LARGE);
    let mut files = vec![("large".to_owned(), large)];
    for n in 0..SMALL {
        let len = noise(seed + n as u64, 8)
            .iter()
            .fold(0, |sum, b| sum * 31 + usize::from(*b));
        let bytes = noise(seed ^ (n as u64 + 1) << 32, 1 + len % SMALL_LEN);
        files.push((format!("small-{n}"), bytes));
    }
    Arc::new(
        files
            .into_iter()
            .map(|(name, bytes)| (format!("{seed}/{name}"), bytes))
            .collect(),
    )
}

fn blob(seed: u64, files: &Files) -> Blob {
    let dir = Entry::dir(format!("{seed}"));
    let files = files
        .iter()
        .map(|(path, bytes)| Entry::file(path.as_str(), bytes.as_slice()));
    let entries: Vec<_> = [dir].into_iter().chain(files).collect();
    Blob::plain(&tar(&entries))
}

/// Makes the images and pushes them.
fn publish(cluster: &Cluster, registry: &Registry) -> Vec<Image> {
    let dir = cluster.dir().join("layout");
    let mut layout = Layout::create(&dir).unwrap();
    let mut images = Vec::new();
    let mut base = (Arc::default(), None);
    for n in 0..IMAGES {
        if n % FAMILY == 0 {
            let seed = 500 + n as u64;
            let files = files(seed);
            let of_base = blob(seed, &files);
            base = (files, Some(of_base));
        }
        let seed = 1_000 + n as u64;
        let own = files(seed);
        let tag = format!("i-{n}");
        let layers = [base.1.clone().unwrap(), blob(seed, &own)];
        layout.blobs(&tag, &layers).unwrap();
        let (from, to) = (
            layout.reference(&tag),
            format!("docker://{}/soak/{tag}:1", registry.host()),
        );
        let args = ["copy", "--quiet", "--dest-tls-verify=false", &from, &to];
        shell::check("skopeo", args, Duration::from_secs(60)).unwrap();
        images.push(Image {
            tag,
            layers: [Arc::clone(&base.0), own],
            shown: RwLock::default(),
            busy: Mutex::default(),
        });
    }
    fs::remove_dir_all(dir).unwrap();
    images
}

impl Soak {
    fn reference(&self, image: &Image) -> String {
        format!("{}/soak/{}:1", self.registry.host(), image.tag)
    }

    /// Removes an image now and then, and pulls it.
    fn pull(&self, dice: &mut Dice) {
        let image = &self.images[dice.below(IMAGES as u64) as usize];
        let Ok(_busy) = image.busy.try_lock() else {
            return;
        };
        let reference = self.reference(image);
        if dice.below(REMOVE) == 0 {
            let mut shown = image.shown.write().unwrap_or_else(PoisonError::into_inner);
            if !shown.is_empty() {
                shown.clear();
                self.cluster.harbour(["rm", &reference]).unwrap();
                self.removals.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut command = self
            .cluster
            .command(["pull", "--insecure", "--json", &reference]);
        let output = shell::run(&mut command, PULL_LIMIT).unwrap();
        if !output.status.success() && output.stderr.contains("no room") {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let output = output
            .ok()
            .unwrap_or_else(|e| panic!("{e:#}\n{}", self.cluster.logs()));
        let reports: Vec<Pulled> = serde_json::from_slice(&output.stdout).unwrap();
        self.pulls.fetch_add(1, Ordering::Relaxed);
        let mut places = vec![self.cluster.rootfs(&reports[0]).unwrap()];
        // The kernel's own mount of it, where there are such.
        let view = self
            .cluster
            .run_dir()
            .join("view")
            .join(short(&reports[0].manifest));
        places.extend(view.exists().then_some(view));
        image.show(places);
    }

    /// Reads stretches of files of an image that is there, and compares them.
    fn read(&self, dice: &mut Dice) {
        let image = &self.images[dice.below(IMAGES as u64) as usize];
        for _ in 0..READS {
            if self.stopped.load(Ordering::Relaxed) {
                return;
            }
            let shown = image.shown.read().unwrap_or_else(PoisonError::into_inner);
            let Some(place) = shown.get(dice.below(shown.len() as u64) as usize) else {
                drop(shown);
                thread::sleep(Duration::from_millis(2));
                return;
            };
            let files = &image.layers[dice.below(2) as usize];
            // Half of the reads go to the large file, which has most of the bytes.
            let file = dice.below(2) * (1 + dice.below(SMALL as u64));
            let (path, bytes) = &files[file as usize];
            let path = place.join(path);
            let offset = dice.below(bytes.len() as u64) as usize;
            let wanted = &bytes[offset..bytes.len().min(offset + READ)];
            let mut read = vec![0; wanted.len()];
            let start = Instant::now();
            let done =
                fs::File::open(&path).and_then(|file| file.read_exact_at(&mut read, offset as u64));
            let took = start.elapsed();
            done.unwrap_or_else(|e| {
                panic!(
                    "{} at {offset}, after {took:?}: {e}\n{}",
                    path.display(),
                    self.cluster.logs()
                )
            });
            assert!(
                read == wanted,
                "{} at {offset}: other bytes",
                path.display()
            );
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.read_bytes
                .fetch_add(wanted.len() as u64, Ordering::Relaxed);
            self.longest_us
                .fetch_max(took.as_micros() as u64, Ordering::Relaxed);
        }
    }

    /// metad's books are those of a full recount.
    fn audit(&self) {
        let output = self.cluster.run(["audit", "--json"]).unwrap();
        assert!(
            output.status.success(),
            "{}{}",
            output.text(),
            output.stderr
        );
        let audit: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(audit["equal"], true, "{audit}");
    }

    /// One figure of `/metrics`.
    fn metric(&self, name: &str) -> f64 {
        let text = web::get(self.metrics, "/metrics").unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    /// Everything is taken away, and nothing of it stays in the books.
    fn empty(&self) {
        for image in self.cluster.json("images").unwrap().as_array().unwrap() {
            let field = |key: &str| image[key].as_str().unwrap().to_owned();
            let name = format!(
                "{}/{}:{}",
                field("registry"),
                field("repository"),
                field("tag")
            );
            self.cluster.harbour(["rm", &name]).unwrap();
        }
        let settled = shell::until("the books are empty", SETTLE_LIMIT, || {
            let books = self.cluster.json("status")?["metad"].clone();
            let keys = [
                "used_bytes",
                "reserved_bytes",
                "quarantined_bytes",
                "layers",
                "objects",
                "packs",
            ];
            Ok(keys.iter().all(|key| books[*key] == 0).then_some(()))
        });
        settled.unwrap_or_else(|e| panic!("{e:#}\n{}", self.cluster.logs()));
        self.audit();
    }
}

/// Sets what it holds when it goes, however that comes about.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Pulls and reads for as long as is asked for, with a recount now and then; gives how many of those.
fn carry_on(soak: &Soak, seed: u64, lasts: Duration) -> u64 {
    let stopped = &soak.stopped;
    let mut audits = 0;
    thread::scope(|scope| {
        let stop = Stop(stopped);
        // What everybody chooses follows from the seed and their number.
        let somebody = |number: u64, work: fn(&Soak, &mut Dice)| {
            let mut dice = Dice::new(seed << 16 | number);
            scope.spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    work(soak, &mut dice);
                }
            })
        };
        let mut busy: Vec<_> = (0..PULLERS).map(|n| somebody(n, Soak::pull)).collect();
        busy.extend((0..READERS).map(|n| somebody(100 + n, Soak::read)));
        let end = Instant::now() + lasts;
        let (mut audited, mut dropped) = (Instant::now(), Instant::now());
        while Instant::now() < end && !busy.iter().any(ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(50));
            if dropped.elapsed() > DROP_EVERY {
                fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
                dropped = Instant::now();
            }
            if audited.elapsed() > AUDIT_EVERY {
                soak.audit();
                audits += 1;
                audited = Instant::now();
            }
        }
        drop(stop);
        for one in busy {
            assert!(one.join().is_ok(), "every pull and every read went well");
        }
    });
    audits
}

#[test]
fn a_pool_of_half_the_working_set_serves_all_of_it() {
    let (lasts, seed) = (
        setting("HARBOUR_SOAK_S", LASTS_S),
        setting("HARBOUR_SOAK_SEED", SEED),
    );
    println!("seed {seed}, {lasts} s");
    let registry = Registry::start().unwrap();
    let metrics = web::free_port().unwrap();
    let toml = format!(
        "[metad]\nmetrics = '127.0.0.1:{metrics}'\n[registry.\"{}\"]\ninsecure = true\n",
        registry.host()
    );
    let cluster = Cluster::configured(LEND, &toml).unwrap();
    let _donors = ["one", "two"].map(|name| Donor::start(&cluster, name, LEND).unwrap());
    let images = publish(&cluster, &registry);
    let soak = Soak {
        cluster,
        registry,
        images,
        metrics,
        stopped: AtomicBool::new(false),
        reads: AtomicU64::new(0),
        read_bytes: AtomicU64::new(0),
        longest_us: AtomicU64::new(0),
        pulls: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        removals: AtomicU64::new(0),
    };
    let audits = carry_on(&soak, seed, Duration::from_secs(lasts));
    soak.audit();
    let (hit_ratio, evictions) = (
        soak.metric("harbour_metad_pool_hit_ratio"),
        soak.metric("harbour_metad_evictions"),
    );
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "figures: {lasts} s, seed {seed}: {} reads of {} MiB, longest {} ms; {} pulls, {} found no room, \
         {} images removed; {evictions} packs evicted, hit ratio {hit_ratio:.3}; {audits} recounts meanwhile, all equal",
        count(&soak.reads),
        count(&soak.read_bytes) >> 20,
        count(&soak.longest_us) / 1000,
        count(&soak.pulls),
        count(&soak.refused),
        count(&soak.removals),
    );
    assert!(evictions > 0.0 && count(&soak.reads) > 100 && count(&soak.pulls) > 5);
    assert!(hit_ratio > 0.0 && hit_ratio < 1.0, "{hit_ratio}");
    soak.empty();
}
