//! The protocol of locks, leases and commits under a model checker.
//!
//! Hosts claim layers, unpack and commit them. Messages are lost, come late and come twice, sessions
//! break, hosts die and come back under another number, or do nothing for as long as the checker
//! likes (which is what a frozen host, a slow one and one with another clock look like from outside: no
//! host asks its clock anything), and metad starts anew from what it has written down. The machine is the
//! real one; around it stand what `engine::locks`, `engine::commit_layer` and a pull do with it.
//!
//! Checked in every reachable state: a layer is committed once, the machine is sound, and when nothing
//! more goes wrong every live host ends with every layer.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::Hash,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use stateright::{Checker, Model, Property};

use super::{Change, Machine, Mode, OwnerId, Reply, Request, Row};

/// A lease, in ticks of the world's clock.
const LEASE: u64 = 1;

type Layer = u8;

/// What may still go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Left {
    deaths: u32,
    restarts: u32,
    /// Messages lost, or delivered and not answered.
    losses: u32,
    ticks: u32,
}

/// The protocol with so many hosts and layers.
#[derive(Clone, Debug)]
struct Protocol {
    hosts: usize,
    layers: Layer,
    left: Left,
    /// Off: commits count whatever token they carry, to see that the checker finds what comes of it.
    fencing: bool,
}

/// How far a host is with a layer, as it believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Belief {
    Wanted,
    InLine,
    Held(u64),
    Unpacked(u64),
    Sent(u64),
    There,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host {
    dead: bool,
    /// The lease it has, as it believes.
    pull: Option<OwnerId>,
    layers: Vec<Belief>,
    /// News that its session has for it.
    news: VecDeque<(Layer, Option<u64>)>,
}

impl Host {
    /// Its pull is over: what has not come is wanted again, by another.
    fn begin_again(&mut self) {
        self.pull = None;
        self.hang_up();
        for belief in &mut self.layers {
            if *belief != Belief::There {
                *belief = Belief::Wanted;
            }
        }
    }

    /// Its session is over: it asks again for what it waits for.
    fn hang_up(&mut self) {
        self.news.clear();
        for belief in &mut self.layers {
            if *belief == Belief::InLine {
                *belief = Belief::Wanted;
            }
        }
    }

    fn done(&self) -> bool {
        self.layers.iter().all(|belief| *belief == Belief::There)
    }
}

/// A commit on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Commit {
    pull: OwnerId,
    layer: Layer,
    fence: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    machine: Machine<Layer>,
    /// The table of claims.
    written: BTreeMap<(Layer, OwnerId), Row<Layer>>,
    /// Who has committed each layer.
    committed: BTreeMap<Layer, Vec<OwnerId>>,
    hosts: Vec<Host>,
    flight: BTreeSet<Commit>,
    now: u64,
    pulls: OwnerId,
    left: Left,
    /// A commit came too late.
    fenced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begin(usize),
    Ask {
        host: usize,
        layer: Layer,
        lost: bool,
    },
    Hear(usize),
    SessionBreaks(usize),
    LookAndUnpack {
        host: usize,
        layer: Layer,
    },
    Send {
        host: usize,
        layer: Layer,
    },
    Deliver {
        commit: Commit,
        again: bool,
    },
    Renew(usize),
    Die(usize),
    Restart,
    Tick,
}

impl World {
    fn new(protocol: &Protocol) -> Self {
        let host = Host {
            dead: false,
            pull: None,
            layers: vec![Belief::Wanted; usize::from(protocol.layers)],
            news: VecDeque::new(),
        };
        Self {
            machine: Machine::new(0),
            written: BTreeMap::new(),
            committed: BTreeMap::new(),
            hosts: vec![host; protocol.hosts],
            flight: BTreeSet::new(),
            now: 0,
            pulls: 0,
            left: protocol.left,
            fenced: false,
        }
    }

    /// One transaction of metad.
    fn apply(&mut self, request: Request<Layer>) -> Reply {
        let outcome = self.machine.apply(request, self.now);
        for change in outcome.changes {
            match change {
                Change::Put(row) => drop(self.written.insert((row.key, row.owner), row)),
                Change::Delete { key, owner, .. } => drop(self.written.remove(&(key, owner))),
                Change::Ended { .. } => {}
            }
        }
        for news in outcome.news {
            let listens = |host: &&mut Host| host.pull == Some(news.owner);
            if let Some(host) = self.hosts.iter_mut().find(listens) {
                host.news.push_back((news.key, news.fence));
            }
        }
        outcome.reply
    }

    fn step(&mut self, step: Step, fencing: bool) {
        match step {
            Step::Begin(host) => {
                self.pulls += 1;
                let owner = self.pulls;
                let until_ms = self.now + LEASE;
                self.apply(Request::Open { owner, until_ms });
                self.hosts[host].pull = Some(owner);
            }
            Step::Ask { host, layer, lost } => self.ask(host, layer, lost),
            Step::Hear(host) => self.hear(host),
            Step::SessionBreaks(host) => {
                self.left.losses -= 1;
                self.hosts[host].hang_up();
                if let Some(owner) = self.hosts[host].pull {
                    let until_ms = self.now + 1;
                    self.apply(Request::Shorten { owner, until_ms });
                }
            }
            Step::LookAndUnpack { host, layer } => self.look(host, layer),
            Step::Send { host, layer } => {
                let of = &mut self.hosts[host];
                let belief = &mut of.layers[usize::from(layer)];
                if let (Belief::Unpacked(fence), Some(pull)) = (*belief, of.pull) {
                    *belief = Belief::Sent(fence);
                    self.flight.insert(Commit { pull, layer, fence });
                }
            }
            Step::Deliver { commit, again } => self.deliver(commit, again, fencing),
            Step::Renew(host) => {
                if let Some(owner) = self.hosts[host].pull {
                    let until_ms = self.now + LEASE;
                    if self.apply(Request::Renew { owner, until_ms }) == Reply::Gone {
                        self.hosts[host].begin_again();
                    }
                }
            }
            Step::Die(host) => {
                self.left.deaths -= 1;
                self.hosts[host].begin_again();
                self.hosts[host].dead = true;
            }
            Step::Restart => {
                self.left.restarts -= 1;
                self.restart();
            }
            Step::Tick => {
                self.left.ticks = self.left.ticks.saturating_sub(1);
                self.now += 1;
                self.apply(Request::Tick);
            }
        }
    }

    fn ask(&mut self, host: usize, layer: Layer, lost: bool) {
        let Some(owner) = self.hosts[host].pull else {
            return;
        };
        let reply = self.apply(Request::Acquire {
            owner,
            key: layer,
            mode: Mode::Exclusive,
            wait: true,
        });
        if lost {
            self.left.losses -= 1;
            return;
        }
        match reply {
            Reply::Held { fence } => {
                self.hosts[host].layers[usize::from(layer)] = Belief::Held(fence);
            }
            Reply::Waiting { .. } => self.hosts[host].layers[usize::from(layer)] = Belief::InLine,
            _ => self.hosts[host].begin_again(),
        }
    }

    fn hear(&mut self, host: usize) {
        let of = &mut self.hosts[host];
        let Some((layer, fence)) = of.news.pop_front() else {
            return;
        };
        let belief = &mut of.layers[usize::from(layer)];
        match (fence, *belief) {
            (Some(fence), Belief::Wanted | Belief::InLine) => *belief = Belief::Held(fence),
            (None, Belief::Wanted | Belief::InLine) => *belief = Belief::There,
            _ => {}
        }
    }

    /// Whoever held it before may have committed it: then the claim is given up.
    fn look(&mut self, host: usize, layer: Layer) {
        let of = &mut self.hosts[host];
        let belief = &mut of.layers[usize::from(layer)];
        let (Belief::Held(fence), Some(owner)) = (*belief, of.pull) else {
            return;
        };
        if !self.committed.contains_key(&layer) {
            *belief = Belief::Unpacked(fence);
            return;
        }
        *belief = Belief::There;
        self.apply(Request::Release { owner, key: layer });
    }

    fn deliver(&mut self, commit: Commit, again: bool, fencing: bool) {
        let Commit { pull, layer, fence } = commit;
        self.apply(Request::Tick);
        let holds = self
            .machine
            .holds(pull, &layer, Mode::Exclusive, fence, self.now);
        if holds || !fencing {
            self.committed.entry(layer).or_default().push(pull);
            self.apply(Request::Commit {
                owner: pull,
                key: layer,
                fence,
            });
        }
        // A repetition by a pull that lives is answered as it was at first.
        let lives = self.machine.lives(pull, self.now);
        let by = self.committed.get(&layer);
        let good = holds || (lives && by.is_some_and(|by| by.contains(&pull)));
        self.fenced |= !good;
        if again {
            self.left.losses -= 1;
            return;
        }
        self.flight.remove(&commit);
        let waits = |host: &&mut Host| host.pull == Some(pull);
        if let Some(host) = self.hosts.iter_mut().find(waits) {
            match good {
                true => host.layers[usize::from(layer)] = Belief::There,
                false => host.begin_again(),
            }
        }
    }

    /// metad has only what was written; its sessions are gone, and its tokens begin above all others.
    fn restart(&mut self) {
        let owners: Vec<_> = self.machine.owners().collect();
        let owners = owners.into_iter().map(|owner| (owner, self.now + LEASE));
        let rows = self.written.values().cloned();
        let issued = self.machine.issued() + 1;
        self.machine = Machine::restore(issued, owners, rows, self.now)
            .unwrap_or_else(|why| panic!("what was written is no machine: {why}"));
        self.hosts.iter_mut().for_each(Host::hang_up);
    }

    /// Nothing more goes wrong, and everybody does what there is to do: every live host has every layer
    /// in the end.
    fn settles(&self, fencing: bool) -> bool {
        let mut world = self.clone();
        let living = |world: &Self| world.hosts.iter().filter(|host| !host.dead).all(Host::done);
        for _ in 0..20 * (self.hosts.len() + 1) {
            for host in 0..world.hosts.len() {
                if world.hosts[host].dead {
                    continue;
                }
                world.step(Step::Renew(host), fencing);
                if world.hosts[host].pull.is_none() {
                    world.step(Step::Begin(host), fencing);
                }
                for _ in 0..world.hosts[host].news.len() {
                    world.step(Step::Hear(host), fencing);
                }
                for layer in 0..world.hosts[host].layers.len() as Layer {
                    if world.hosts[host].layers[usize::from(layer)] == Belief::Wanted {
                        let lost = false;
                        world.step(Step::Ask { host, layer, lost }, fencing);
                    }
                    world.step(Step::LookAndUnpack { host, layer }, fencing);
                    world.step(Step::Send { host, layer }, fencing);
                }
            }
            for commit in world.flight.clone() {
                let again = false;
                world.step(Step::Deliver { commit, again }, fencing);
            }
            if living(&world) {
                return true;
            }
            world.step(Step::Tick, fencing);
        }
        false
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let left = world.left;
        for (number, host) in world.hosts.iter().enumerate() {
            if host.dead || host.done() && host.news.is_empty() {
                continue;
            }
            if left.deaths > 0 {
                steps.push(Step::Die(number));
            }
            if host.pull.is_none() {
                steps.push(Step::Begin(number));
                continue;
            }
            steps.push(Step::Renew(number));
            if !host.news.is_empty() {
                steps.push(Step::Hear(number));
            }
            if left.losses > 0 {
                steps.push(Step::SessionBreaks(number));
            }
            for (layer, belief) in (0..).zip(&host.layers) {
                let host = number;
                match belief {
                    Belief::Wanted => {
                        let lost = false;
                        steps.push(Step::Ask { host, layer, lost });
                        if left.losses > 0 {
                            let lost = true;
                            steps.push(Step::Ask { host, layer, lost });
                        }
                    }
                    Belief::Held(_) => steps.push(Step::LookAndUnpack { host, layer }),
                    Belief::Unpacked(_) => steps.push(Step::Send { host, layer }),
                    Belief::InLine | Belief::Sent(_) | Belief::There => {}
                }
            }
        }
        for commit in &world.flight {
            let commit = *commit;
            steps.push(Step::Deliver {
                commit,
                again: false,
            });
            if left.losses > 0 {
                steps.push(Step::Deliver {
                    commit,
                    again: true,
                });
            }
        }
        if left.restarts > 0 {
            steps.push(Step::Restart);
        }
        if left.ticks > 0 {
            steps.push(Step::Tick);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.step(step, self.fencing);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a layer is committed once", |_, world: &World| {
                world.committed.values().all(|by| by.len() == 1)
            }),
            Property::always("the machine is sound", |_, world: &World| {
                world.machine.check().is_ok()
            }),
            Property::always("all that live are served", |model: &Self, world: &World| {
                world.settles(model.fencing)
            }),
            Property::sometimes("a commit comes too late", |_, world: &World| world.fenced),
            Property::sometimes("one succeeds another", |_, world: &World| {
                let late = world.fenced && world.hosts.iter().all(|host| !host.dead);
                late && world.hosts.iter().all(Host::done)
            }),
        ]
    }
}

/// All states there are, in which all must hold.
fn check(hosts: usize, layers: Layer, left: Left) {
    let protocol = Protocol {
        hosts,
        layers,
        left,
        fencing: true,
    };
    let checked = protocol.checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checked.unique_state_count(), checked.max_depth());
    eprintln!("{hosts} hosts, {layers} layers, {left:?}: {states} states, {depth} steps deep");
    checked.assert_properties();
}

const NOTHING: Left = Left {
    deaths: 0,
    restarts: 0,
    losses: 0,
    ticks: 1,
};

#[test]
fn two_hosts_that_die_and_a_metad_that_starts_anew() {
    let left = Left {
        deaths: 1,
        restarts: 1,
        ticks: 2,
        ..NOTHING
    };
    check(2, 1, left);
}

#[test]
fn two_hosts_and_messages_that_are_lost() {
    let left = Left {
        losses: 2,
        ticks: 2,
        ..NOTHING
    };
    check(2, 1, left);
}

#[test]
fn three_hosts_and_a_layer() {
    check(3, 1, NOTHING);
}

#[test]
fn two_hosts_and_two_layers() {
    check(2, 2, NOTHING);
}

#[test]
fn without_tokens_the_checker_finds_a_second_commit() {
    let protocol = Protocol {
        hosts: 2,
        layers: 1,
        left: NOTHING,
        fencing: false,
    };
    let checked = protocol.checker().spawn_bfs().join();
    let found = checked.discovery("a layer is committed once");
    assert!(found.is_some(), "{} states", checked.unique_state_count());
}

/// Long histories of more hosts than can be checked whole, with much that goes wrong. A failure names the
/// seed, and `HARBOUR_LOCKS_SEED` runs from there on; `HARBOUR_LOCKS_RUNS` makes them more.
#[test]
fn long_histories() {
    let setting = |name: &str, default: u64| match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|e| panic!("{name}={text}: {e}")),
        Err(_) => default,
    };
    let first = setting("HARBOUR_LOCKS_SEED", 1);
    let runs = setting("HARBOUR_LOCKS_RUNS", 300);
    let mut fenced = 0;
    for seed in first..first + runs {
        let world = history(seed);
        fenced += u32::from(world.fenced);
    }
    eprintln!("{runs} histories from seed {first}; commits came too late in {fenced}");
    assert!(runs < 100 || fenced > 0, "nothing ever went wrong");
}

fn history(seed: u64) -> World {
    let mut rng = StdRng::seed_from_u64(seed);
    let protocol = Protocol {
        hosts: 5,
        layers: 6,
        left: Left {
            deaths: 3,
            restarts: 4,
            losses: 30,
            ticks: 60,
        },
        fencing: true,
    };
    let mut world = World::new(&protocol);
    let mut steps = Vec::new();
    for number in 0..2000 {
        steps.clear();
        protocol.actions(&world, &mut steps);
        if steps.is_empty() {
            break;
        }
        let step = steps[rng.random_range(0..steps.len())];
        world.step(step, true);
        let twice = world.committed.values().any(|by| by.len() != 1);
        assert!(
            !twice,
            "seed {seed}: {step:?}, number {number}, committed twice"
        );
        let sound = world.machine.check();
        assert_eq!(
            sound,
            Ok(()),
            "seed {seed}: after {step:?}, number {number}"
        );
    }
    assert!(world.settles(true), "seed {seed}: somebody waits for ever");
    world
}
