//! Random histories against a simple model. The model has the memory of every donor, page by
//! page, and the knowledge of every node: after each step the books balance, what is visible is
//! what was committed, every replica that a reader is or was told of and may still use holds the
//! bytes of its pack, and at the end everything comes back. Donors ([`donors`]) grow, shrink, leave,
//! fall silent, and copy from each other, well or badly.

mod donors;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use harbour_metad_client::v1;
use proptest::prelude::*;

use super::world::{Layer, Pack, Tune, World, digest, index_pack, pack};
use crate::error::{Error, Hash};
use donors::{Donor, Memory};

/// Pages that each donor lends at first: few, so that most histories have to evict.
const PAGES: u64 = 9;

/// Donors, the last two of which fail together.
const DONORS: usize = 3;

/// Names that images get.
const NAMES: u32 = 3;

#[derive(Clone, Debug)]
enum Op {
    Begin,
    /// Reserve, write and stage a layer, cut in one of two ways.
    Stage {
        pull: usize,
        diff: u32,
        cut: u32,
    },
    Find {
        pull: usize,
        diff: u32,
    },
    Commit {
        pull: usize,
        name: u32,
    },
    Abort {
        pull: usize,
    },
    /// A writer that has not heard of its end writes once more.
    WriteLate {
        pull: usize,
    },
    Remove {
        name: u32,
    },
    /// Time passes; writers keep their leases or do not, and so does the donor.
    Pass {
        ms: u64,
        renew: bool,
        beat: bool,
    },
    /// A donor registers again.
    Donor {
        donor: usize,
    },
    NewEpoch {
        donor: usize,
    },
    /// A donor gives a region back, or lends one more.
    Resize {
        donor: usize,
        grow: bool,
        told: bool,
    },
    /// A donor wants to leave, or does not any more.
    Drain {
        donor: usize,
        draining: bool,
    },
    /// A donor makes one of its copies and tells, or does not.
    Copy {
        donor: usize,
        report: bool,
    },
    /// A pull could not write somewhere.
    GiveBack {
        pull: usize,
    },
    Node,
    /// A node asks where everything lies.
    Locate {
        node: usize,
    },
    /// A node drops what it was told to, and says what it holds.
    Beat {
        node: usize,
        hold: bool,
    },
    Lost {
        pack: usize,
    },
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let some = 0usize..12;
    prop_oneof![
        3 => Just(Op::Begin),
        8 => (some.clone(), 0u32..4, 0u32..2).prop_map(|(pull, diff, cut)| Op::Stage { pull, diff, cut }),
        2 => (some.clone(), 0u32..4).prop_map(|(pull, diff)| Op::Find { pull, diff }),
        8 => (some.clone(), 0..NAMES).prop_map(|(pull, name)| Op::Commit { pull, name }),
        1 => some.clone().prop_map(|pull| Op::Abort { pull }),
        2 => some.clone().prop_map(|pull| Op::WriteLate { pull }),
        1 => (0..NAMES).prop_map(|name| Op::Remove { name }),
        5 => (1u64..10, any::<[bool; 3]>())
            .prop_map(|(half, quiet)| Op::Pass { ms: half * 500, renew: quiet[0], beat: quiet[1] || quiet[2] }),
        1 => Just(Op::Pass { ms: 16_000, renew: false, beat: true }),
        1 => (0..DONORS).prop_map(|donor| Op::Donor { donor }),
        1 => (0..DONORS).prop_map(|donor| Op::NewEpoch { donor }),
        2 => (0..DONORS, any::<[bool; 2]>())
            .prop_map(|(donor, [grow, told])| Op::Resize { donor, grow, told }),
        1 => (0..DONORS, any::<bool>()).prop_map(|(donor, draining)| Op::Drain { donor, draining }),
        6 => (0..DONORS, any::<[bool; 3]>())
            .prop_map(|(donor, not)| Op::Copy { donor, report: not.contains(&true) }),
        1 => some.clone().prop_map(|pull| Op::GiveBack { pull }),
        1 => Just(Op::Node),
        6 => some.clone().prop_map(|node| Op::Locate { node }),
        3 => (some.clone(), any::<bool>()).prop_map(|(node, hold)| Op::Beat { node, hold }),
        1 => (0usize..40).prop_map(|pack| Op::Lost { pack }),
        1 => Just(Op::Restart),
    ]
}

/// Layers that share a pack with their neighbour, in two cuts.
fn layer(diff: u32, cut: u32) -> Layer {
    let own = diff * 10 + cut * 5;
    Layer {
        diff,
        index: 100 + own,
        packs: vec![
            Pack(own, 4096 * (1 + diff % 3)),
            Pack(own + 1, 100),
            Pack(900 + diff / 2, 5000),
        ],
    }
}

/// All packs that any history can make.
fn all_packs() -> Vec<Pack> {
    let mut packs: BTreeSet<(u32, u32)> = BTreeSet::new();
    for diff in 0..4 {
        for cut in 0..2 {
            let layer = layer(diff, cut);
            packs.extend(
                layer
                    .packs
                    .iter()
                    .chain([&index_pack(layer.index)])
                    .map(|Pack(n, len)| (*n, *len)),
            );
        }
    }
    packs.extend(
        (0..16)
            .map(|image| index_pack(500 + image))
            .map(|Pack(n, len)| (n, len)),
    );
    packs
        .into_iter()
        .map(|(number, len)| Pack(number, len))
        .collect()
}

#[derive(Debug)]
struct Pull {
    reference: v1::PullRef,
    /// Layers staged or found.
    layers: BTreeSet<u32>,
    /// What it was told to write, for as long as it may believe so.
    writes: Vec<(Hash, v1::Extent)>,
    heard_ms: u64,
}

#[derive(Debug, Default)]
struct Node {
    id: u64,
    heard_ms: u64,
    known: HashMap<Hash, Vec<v1::Extent>>,
    told: u64,
}

struct Model {
    world: World,
    donors: Vec<Donor>,
    memory: Memory,
    pulls: Vec<Pull>,
    nodes: Vec<Node>,
    names: BTreeMap<String, (Hash, Vec<Vec<u8>>)>,
    numbers: HashMap<u32, Vec<u8>>,
}

impl Model {
    fn new(replicas: u32) -> Self {
        let world = World::tuned(Tune::replicas(replicas));
        let donors = (0..DONORS).map(|number| Donor::join(&world, number));
        Self {
            donors: donors.collect(),
            world,
            memory: Memory::default(),
            pulls: Vec::new(),
            nodes: Vec::new(),
            names: BTreeMap::new(),
            numbers: HashMap::new(),
        }
    }

    /// Writes what a reservation gave; what cannot be written is given back. Tells whether all was
    /// written.
    fn take(&mut self, at: usize, packs: &[Pack], reply: &v1::ReserveReply) -> bool {
        let mut all = true;
        for (Pack(number, _), reserved) in packs.iter().zip(&reply.packs) {
            for extent in &reserved.extents {
                self.pulls[at].writes.push((pack(*number), *extent));
                if donors::lends(&self.donors, extent) {
                    self.memory.write(&self.donors, pack(*number), extent);
                } else {
                    self.give_back(at);
                    all = false;
                }
            }
        }
        all
    }

    fn run(&mut self, op: &Op) {
        let (pulls, nodes) = (self.pulls.len(), self.nodes.len());
        match op {
            Op::Begin if pulls < 4 => {
                let reference = self.world.begin();
                let heard_ms = self.world.now();
                self.pulls.push(Pull {
                    reference,
                    layers: BTreeSet::new(),
                    writes: Vec::new(),
                    heard_ms,
                });
            }
            Op::Stage { pull, diff, cut } if pulls > 0 => self.stage(pull % pulls, *diff, *cut),
            Op::Find { pull, diff } if pulls > 0 => self.find(pull % pulls, *diff),
            Op::Commit { pull, name } if pulls > 0 => self.commit(pull % pulls, *name),
            Op::Abort { pull } if pulls > 0 => {
                let gone = self.pulls.remove(pull % pulls);
                self.world.engine.abort(&gone.reference).unwrap();
            }
            Op::WriteLate { pull } if pulls > 0 => {
                let late = &self.pulls[pull % pulls];
                // One lease after its own is as late as a writer may be.
                if self.world.now() < late.heard_ms + 29_000 {
                    for (pack, extent) in late.writes.clone() {
                        self.memory.write(&self.donors, pack, &extent);
                    }
                }
            }
            Op::Remove { name } => {
                let name = format!("n{name}");
                assert_eq!(
                    self.world.remove(&name).is_ok(),
                    self.names.remove(&name).is_some()
                );
            }
            Op::Pass { ms, renew, beat } => self.pass(*ms, *renew, *beat),
            Op::Donor { donor } => self.donors[*donor].register(&self.world),
            Op::NewEpoch { donor } => self.donors[*donor].renew(&self.world),
            Op::Resize { donor, grow, told } => {
                self.donors[*donor].resize(&self.world, *grow, *told);
            }
            Op::Drain { donor, draining } => self.donors[*donor].drain(&self.world, *draining),
            Op::Copy { donor, report } => self.copy(*donor, *report),
            Op::GiveBack { pull } if pulls > 0 => self.give_back(pull % pulls),
            Op::Node if nodes < 4 => {
                let (id, heard_ms) = (self.world.node(), self.world.now());
                self.nodes.push(Node {
                    id,
                    heard_ms,
                    ..Node::default()
                });
            }
            Op::Locate { node } if nodes > 0 => self.locate(node % nodes),
            Op::Beat { node, hold } if nodes > 0 => self.beat(node % nodes, *hold),
            Op::Lost { pack: at } => {
                let all = all_packs();
                let lost = all[at % all.len()];
                let extent = self.world.locate(&[lost])[0].first().copied();
                let report = v1::LostReport {
                    pack: pack(lost.0).to_vec(),
                    extent,
                    ..Default::default()
                };
                let _ = self.world.engine.report_lost(&report);
            }
            Op::Restart => self.world.restart(),
            _ => {}
        }
    }

    fn pass(&mut self, ms: u64, renew: bool, beat: bool) {
        self.world.pass(ms);
        for donor in self.donors.iter_mut().filter(|_| beat) {
            donor.beat(&self.world);
        }
        for pull in self.pulls.iter_mut().filter(|_| renew) {
            if self.world.engine.renew(&pull.reference).is_ok() {
                pull.heard_ms = self.world.now();
            }
        }
    }

    /// A pull gives one of its extents back, and may have written to it for a while longer.
    fn give_back(&mut self, at: usize) {
        let Some((pack, extent)) = self.pulls[at].writes.pop() else {
            return;
        };
        let request = v1::GiveBackRequest {
            pull: Some(self.pulls[at].reference),
            pack: pack.to_vec(),
            extents: vec![extent],
            why: String::new(),
        };
        let _ = self.world.engine.give_back(&request);
        self.pulls[at]
            .writes
            .retain(|(_, written)| *written != extent);
    }

    fn stage(&mut self, at: usize, diff: u32, cut: u32) {
        let (layer, reference) = (layer(diff, cut), self.pulls[at].reference);
        let mut packs = layer.packs.clone();
        packs.push(index_pack(layer.index));
        match self.world.reserve(reference, &packs) {
            Ok(reply) if self.take(at, &packs, &reply) => {}
            Ok(_) | Err(Error::Exhausted(_) | Error::Refused(_)) => return,
            Err(error) => panic!("{error:?}"),
        }
        match self.world.stage(reference, &layer) {
            Ok((again, _)) => {
                self.take(at, &packs, &again);
                self.pulls[at].layers.insert(diff);
            }
            Err(error) => panic!("reserved and not staged: {error:?}"),
        }
    }

    fn find(&mut self, at: usize, diff: u32) {
        let pull = Some(self.pulls[at].reference);
        let request = v1::FindLayersRequest {
            pull,
            diff_ids: vec![digest(b'l', diff).to_vec()],
        };
        if self
            .world
            .engine
            .find_layers(&request)
            .is_ok_and(|reply| reply.layers[0].found)
        {
            self.pulls[at].layers.insert(diff);
        }
    }

    fn commit(&mut self, at: usize, name: u32) {
        let (reference, diffs) = (self.pulls[at].reference, self.pulls[at].layers.clone());
        let manifest = diffs.iter().fold(0, |bits, diff| bits | 1 << diff);
        let diffs: Vec<u32> = diffs.into_iter().collect();
        let index = 500 + manifest;
        match self.world.reserve(reference, &[index_pack(index)]) {
            Ok(reply) if self.take(at, &[index_pack(index)], &reply) => {}
            Ok(_) | Err(Error::Exhausted(_) | Error::Refused(_)) => return,
            Err(error) => panic!("{error:?}"),
        }
        let name = format!("n{name}");
        let (again, _) = self
            .world
            .commit(reference, &name, manifest, index, &diffs)
            .unwrap();
        self.take(at, &[index_pack(index)], &again);
        let diff_ids = diffs
            .iter()
            .map(|diff| digest(b'l', *diff).to_vec())
            .collect();
        self.names.insert(name, (digest(b'm', manifest), diff_ids));
        self.pulls.remove(at);
    }

    fn locate(&mut self, at: usize) {
        let packs = all_packs();
        let places = self.world.locate(&packs);
        let known = &mut self.nodes[at].known;
        for (Pack(number, _), extents) in packs.iter().zip(places) {
            known.insert(pack(*number), extents);
        }
    }

    fn beat(&mut self, at: usize, hold: bool) {
        let (images, layers) = self.world.snapshot();
        let numbers = images
            .iter()
            .map(|image| image.number)
            .chain(layers.iter().map(|layer| layer.number));
        let held: Vec<u32> = if hold { numbers.collect() } else { Vec::new() };
        let node = &mut self.nodes[at];
        let request = v1::NodeHeartbeat {
            node: node.id,
            acknowledged_generation: node.told,
            held,
            used: Vec::new(),
        };
        match self.world.engine.node_heartbeat(&request) {
            Ok(lease) => {
                if lease.forget_all {
                    node.known.clear();
                }
                for freed in lease.freed {
                    node.known.remove(&<Hash>::try_from(freed).unwrap());
                }
                (node.told, node.heard_ms) = (lease.freed_generation, self.world.now());
            }
            Err(Error::NotFound(_)) => {
                // A node that is not known any more drops everything and begins again.
                *node = Node {
                    id: self.world.node(),
                    heard_ms: self.world.now(),
                    ..Node::default()
                };
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn check(&mut self) {
        self.world.books();
        let (images, layers) = self.world.snapshot();
        let names: BTreeMap<String, (Hash, Vec<Vec<u8>>)> = images
            .iter()
            .map(|image| {
                let manifest = <Hash>::try_from(&image.manifest[..]).unwrap();
                (image.tag.clone(), (manifest, image.diff_ids.clone()))
            })
            .collect();
        assert_eq!(names, self.names, "visible is what was committed");
        let shown: HashSet<&Vec<u8>> = layers.iter().map(|layer| &layer.diff_id).collect();
        for image in &images {
            assert!(image.diff_ids.iter().all(|diff_id| shown.contains(diff_id)));
            let before = self.numbers.insert(image.number, image.manifest.clone());
            assert!(
                before.is_none_or(|manifest| manifest == image.manifest),
                "{} again",
                image.number
            );
        }
        for layer in &layers {
            let before = self.numbers.insert(layer.number, layer.diff_id.clone());
            assert!(
                before.is_none_or(|diff_id| diff_id == layer.diff_id),
                "{} again",
                layer.number
            );
        }
        self.check_memory(&layers);
    }

    /// What readers are told, and what nodes were told and may still use, is there.
    fn check_memory(&mut self, layers: &[v1::Layer]) {
        let packs = all_packs();
        let places = self.world.locate(&packs);
        let mut live = HashSet::new();
        for (Pack(number, _), extents) in packs.iter().zip(&places) {
            for extent in extents {
                assert!(
                    self.memory.holds(&pack(*number), extent),
                    "pack {number} is not at {extent:?}"
                );
                live.insert(*number);
            }
        }
        for shown in layers {
            let cuts = (0..4).flat_map(|diff| [layer(diff, 0), layer(diff, 1)]);
            let index = &shown.index.as_ref().unwrap().digest;
            let cut = cuts
                .into_iter()
                .find(|cut| &super::world::sealed(cut.index).1.digest == index)
                .unwrap();
            let whole = live.contains(&index_pack(cut.index).0)
                && cut.packs.iter().all(|p| live.contains(&p.0));
            assert_eq!(shown.state() == v1::LayerState::Ready, whole, "{cut:?}");
        }
        let now_ms = self.world.now();
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            if now_ms >= node.heard_ms + 10_000 {
                // Its lease ended: it may use nothing of what it knows.
                self.nodes[at].known.clear();
                continue;
            }
            for (name, extents) in &node.known {
                for extent in extents.iter().filter(|e| donors::lends(&self.donors, e)) {
                    assert!(
                        self.memory.holds(name, extent),
                        "a node reads {extent:?} and finds another pack"
                    );
                }
            }
        }
    }

    /// Everybody goes: nothing must remain.
    fn finish(mut self) {
        for name in self.names.keys() {
            self.world.remove(name).unwrap();
        }
        self.nodes.clear();
        for _ in 0..40 {
            self.world.pass(2000);
            for donor in &mut self.donors {
                donor.register(&self.world);
            }
        }
        let books = self.world.books();
        let lent: u64 = self.donors.iter().map(Donor::lent_bytes).sum();
        assert_eq!((books.free, books.lent), (lent, lent));
        let status = self.world.engine.status().unwrap();
        assert_eq!(
            (status.packs, status.objects, status.layers, status.images),
            (0, 0, 0, 0)
        );
        assert_eq!(
            std::fs::read_dir(self.world.path().join("index"))
                .unwrap()
                .count(),
            0
        );
        self.world.restart();
        assert_eq!(self.world.books(), books);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn random_histories_agree_with_the_model(
        replicas in 1u32..4,
        ops in prop::collection::vec(op(), 1..150)
    ) {
        let mut model = Model::new(replicas);
        for op in &ops {
            model.run(op);
            model.check();
        }
        model.finish();
    }
}
