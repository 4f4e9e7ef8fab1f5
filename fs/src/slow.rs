//! Threads for operations that wait: for a donor that does not answer, for a refill. They exist so
//! that the few threads that talk to the kernel never wait for one file while others could be
//! served.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::{Condvar, Mutex};

/// Jobs that wait for a thread; more than this and the caller does its job itself.
const QUEUE_MAX: usize = 512;
/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// A bounded set of threads, made when they are needed.
#[derive(Clone)]
pub(crate) struct Slow {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    threads_max: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Slow {
    /// At most `threads_max` threads.
    pub(crate) fn new(threads_max: usize) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            threads_max: threads_max.max(1),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Runs `job` in a thread of this set; in the caller's when too many wait already.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        if state.jobs.len() >= QUEUE_MAX || state.closed {
            drop(state);
            return job();
        }
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() {
            self.shared.wake.notify_one();
        } else if state.threads < self.shared.threads_max {
            state.threads += 1;
            drop(state);
            self.start_thread();
        }
    }

    /// Runs `job` in a thread of this set when one is free or can be made, else not at all.
    pub(crate) fn offer(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut state = self.shared.state.lock();
        if state.closed {
            return false;
        }
        if state.idle > state.jobs.len() {
            state.jobs.push_back(Box::new(job));
            self.shared.wake.notify_one();
            return true;
        }
        if state.threads >= self.shared.threads_max {
            return false;
        }
        state.jobs.push_back(Box::new(job));
        state.threads += 1;
        drop(state);
        self.start_thread();
        true
    }

    /// Jobs that wait or run, for the status page.
    pub(crate) fn busy(&self) -> usize {
        let state = self.shared.state.lock();
        state.jobs.len() + state.threads - state.idle
    }

    /// Lets the threads end once the queue is empty.
    pub(crate) fn close(&self) {
        self.shared.state.lock().closed = true;
        self.shared.wake.notify_all();
    }

    fn start_thread(&self) {
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new()
            .name("fs-slow".into())
            .spawn(move || shared.work());
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a slow operation");
            self.shared.state.lock().threads -= 1;
            // With no thread at all nobody would come for the job, so it is done here.
            while let Some(job) = self.shared.next_if_alone() {
                job();
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A job that panics must not take the thread's place in the count with it.
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a slow operation panicked");
                }
                state = self.state.lock();
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let timed_out = self.wake.wait_for(&mut state, LINGER).timed_out();
            state.idle -= 1;
            if timed_out && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }

    fn next_if_alone(&self) -> Option<Job> {
        let mut state = self.state.lock();
        if state.threads == 0 {
            state.jobs.pop_front()
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_side_by_side_and_all_of_them() {
        let slow = Slow::new(4);
        let (done, finished) = mpsc::channel();
        let (release, wait) = mpsc::channel::<()>();
        let done_too = done.clone();
        slow.run(move || {
            wait.recv_timeout(Duration::from_secs(20)).unwrap();
            done_too.send(0).unwrap();
        });
        for number in 1..50 {
            let done = done.clone();
            slow.run(move || done.send(number).unwrap());
        }
        for _ in 1..50 {
            assert_ne!(finished.recv_timeout(Duration::from_secs(20)).unwrap(), 0);
        }
        release.send(()).unwrap();
        assert_eq!(finished.recv_timeout(Duration::from_secs(20)).unwrap(), 0);
        assert!(slow.shared.state.lock().threads <= 4);
    }

    #[test]
    fn an_offer_waits_for_no_thread() {
        let slow = Slow::new(2);
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for _ in 0..2 {
            let wait = Arc::clone(&wait);
            assert!(slow.offer(move || {
                let _ = wait.lock().recv_timeout(Duration::from_secs(20));
            }));
        }
        assert!(!slow.offer(|| panic!("there is no thread for this")));
        drop(release);
        let (done, finished) = mpsc::channel();
        let offered = (0..2000).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            let done = done.clone();
            slow.offer(move || done.send(()).unwrap())
        });
        assert!(offered);
        finished.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn a_panic_costs_no_thread() {
        let slow = Slow::new(1);
        let (done, finished) = mpsc::channel();
        slow.run(|| panic!("on purpose"));
        slow.run(move || done.send(1).unwrap());
        assert_eq!(finished.recv_timeout(Duration::from_secs(20)).unwrap(), 1);
        slow.close();
    }
}
