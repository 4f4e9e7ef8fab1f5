//! Which fast views are mounted, kept in step with the catalogue.

use std::{
    collections::BTreeSet,
    os::unix::{ffi::OsStrExt, fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use harbour_fs::{
    Changes, Fs,
    fastview::{self, FastViewError, Source},
    session::{self, MountConfig, Mounted},
};
use nix::mount::{MntFlags, umount2};

use crate::config::Places;

/// Most fast views mounted at once on a host; images beyond it are served as directories alone.
const VIEWS_MAX: usize = 1024;

/// How far the kernel reads ahead in a fast view, in KiB.
const READ_AHEAD_KB: u32 = 1024;

/// Fast views of one node, each at its name below a directory of this host.
#[derive(Debug)]
pub struct FastViews {
    erofs: PathBuf,
    dir: PathBuf,
    /// A second mount of the same files, with opens, for their parts. Without it views are mounted
    /// from whole files.
    devices: Option<Mounted>,
}

impl FastViews {
    /// Those of these places and of `fs`, which is mounted there already; what an earlier process
    /// left is taken away.
    pub fn new(places: &Places, fs: &Arc<Fs>, threads: usize) -> std::io::Result<Self> {
        let dir = places.views();
        std::fs::create_dir_all(&dir)?;
        fastview::clean(&dir)?;
        let config = MountConfig {
            threads,
            opens: true,
            ..MountConfig::new(places.devices())
        };
        // A comma would end the mount option that names a part.
        let fits = !places.devices().as_os_str().as_bytes().contains(&b',');
        let devices = fits.then(|| session::mount(Arc::clone(fs), &config));
        let devices = devices.transpose().unwrap_or_else(|error| {
            let error = super::refill::chain(&error);
            tracing::warn!(error, "fast views are mounted from whole files");
            None
        });
        Ok(Self {
            erofs: places.mount.join("erofs"),
            dir,
            devices,
        })
    }

    /// Mounts the view of this name.
    pub fn mount(&self, name: &str) -> Result<(), FastViewError> {
        let source = match &self.devices {
            Some(devices) => {
                let part = |suffix| {
                    devices
                        .mountpoint()
                        .join(format!(".devices/{name}.{suffix}"))
                };
                Source::Parts {
                    head: part("head"),
                    bulk: part("bulk"),
                }
            }
            None => Source::Whole(self.erofs.join(format!("{name}.erofs"))),
        };
        fastview::mount(&source, &self.dir.join(name), READ_AHEAD_KB)
    }

    /// Makes the kernel drop what is not true any more of the files that views are mounted from.
    pub fn invalidate(&self, changes: &Changes) {
        if let Some(devices) = &self.devices {
            devices.invalidate(changes);
        }
    }

    /// Unmounts it; with `lazy` also while somebody uses it.
    pub fn unmount(&self, name: &str, lazy: bool) -> Result<(), FastViewError> {
        fastview::unmount(&self.dir.join(name), lazy)
    }

    /// Names of those that are mounted.
    pub fn mounted(&self) -> Vec<String> {
        let lines = fastview::list(&self.dir).unwrap_or_default();
        lines
            .iter()
            .filter_map(|line| line.target.file_name()?.to_str().map(str::to_owned))
            .collect()
    }
}

/// A thread that mounts and unmounts, so that nobody who answers the kernel ever does.
pub struct Keeper {
    wanted: Arc<(Mutex<Wanted>, Condvar)>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Wanted {
    names: BTreeSet<String>,
    generation: u64,
    changed: bool,
    stop: bool,
    /// The generation whose views are mounted, as far as they can be.
    applied: u64,
}

impl Keeper {
    /// Starts the thread.
    pub fn start(views: Arc<FastViews>) -> std::io::Result<Self> {
        let wanted: Arc<(Mutex<Wanted>, Condvar)> = Arc::default();
        let shared = Arc::clone(&wanted);
        let thread = thread::Builder::new()
            .name("views".into())
            .spawn(move || keep(&views, &shared))?;
        Ok(Self {
            wanted,
            thread: Some(thread),
        })
    }

    /// The generation of the catalogue whose views are mounted, as far as they can be.
    pub fn applied(&self) -> u64 {
        self.wanted
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .applied
    }

    /// From now on the views of this generation are to be mounted, by their names under `erofs/`.
    pub fn want(&self, names: BTreeSet<String>, generation: u64) {
        let mut wanted = self.wanted.0.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.names = names;
        wanted.generation = generation;
        wanted.changed = true;
        self.wanted.1.notify_all();
    }

    /// Unmounts everything and ends the thread.
    pub fn stop(mut self) {
        {
            let mut wanted = self.wanted.0.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.stop = true;
            self.wanted.1.notify_all();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn keep(views: &FastViews, shared: &(Mutex<Wanted>, Condvar)) {
    let mut mounted: BTreeSet<String> = BTreeSet::new();
    loop {
        let (names, generation, stop) = {
            let guard = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = shared
                .1
                .wait_timeout_while(guard, Duration::from_secs(5), |w| !w.changed && !w.stop);
            let mut wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
            wanted.changed = false;
            (wanted.names.clone(), wanted.generation, wanted.stop)
        };
        let target: BTreeSet<String> = if stop {
            BTreeSet::new()
        } else {
            names.into_iter().take(VIEWS_MAX).collect()
        };
        for name in mounted.difference(&target).cloned().collect::<Vec<_>>() {
            if let Err(error) = views.unmount(&name, stop) {
                tracing::debug!(name, %error, "a fast view cannot be unmounted yet");
                if !stop {
                    continue;
                }
            }
            mounted.remove(&name);
        }
        for name in target.difference(&mounted).cloned().collect::<Vec<_>>() {
            match views.mount(&name) {
                Ok(_) => {
                    mounted.insert(name);
                }
                // The kernel cannot: asking again would change nothing.
                Err(error @ FastViewError::Unsupported(_)) => {
                    tracing::info!(%error, "no fast views");
                    lock(shared).applied = u64::MAX;
                    return;
                }
                Err(error) => {
                    tracing::warn!(
                        name,
                        error = super::refill::chain(&error),
                        "a fast view cannot be mounted; its directories serve"
                    );
                }
            }
        }
        if stop {
            return;
        }
        lock(shared).applied = generation;
    }
}

fn lock(shared: &(Mutex<Wanted>, Condvar)) -> MutexGuard<'_, Wanted> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether something is mounted on `dir`.
pub fn is_mounted(dir: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|meta| meta.dev());
    match (device(dir), dir.parent().map(device)) {
        (Ok(own), Some(Ok(parent))) => own != parent,
        _ => false,
    }
}

/// Detaches every mount that is left of these places; tells how many there were.
pub fn detach_all(places: &Places) -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (views, devices) = (places.views(), places.devices());
    let ours = [&places.mount, &devices];
    let mut points: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(&views) || ours.contains(&point))
        .collect();
    // What was mounted last stands on what was mounted first.
    points.reverse();
    points
        .iter()
        .filter(|point| umount2(point.as_path(), MntFlags::MNT_DETACH).is_ok())
        .count()
}

/// A path as /proc/self/mountinfo writes it: octal escapes for blank, tab, newline and backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}
