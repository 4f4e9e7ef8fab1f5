//! An engine on a temporary directory with a clock that stands, and short words for its calls.

use std::{collections::HashSet, sync::Arc};

use harbour_metad_client::v1;

use super::super::{Engine, Options, Reserving};
use crate::{
    clock::{Clock, ManualClock},
    error::{Error, Hash},
    space::Books,
};

/// A digest out of a kind and a number.
pub(super) fn digest(kind: u8, number: u32) -> Hash {
    *blake3::hash(&[&[kind][..], &number.to_le_bytes()].concat()).as_bytes()
}

pub(super) fn pack(number: u32) -> Hash {
    digest(b'p', number)
}

/// A pack and its length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pack(pub(super) u32, pub(super) u32);

/// What a test wants in a layer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) diff: u32,
    /// Content of the index.
    pub(super) index: u32,
    pub(super) packs: Vec<Pack>,
}

/// What an engine of a test is told about replicas.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tune {
    pub(super) replicas: u32,
    pub(super) hot_replicas: u32,
    pub(super) rebalance_mib_s: u32,
}

impl Tune {
    pub(super) fn replicas(replicas: u32) -> Self {
        Self {
            replicas,
            hot_replicas: 0,
            rebalance_mib_s: 128,
        }
    }
}

pub(super) struct World {
    tune: Tune,
    folder: tempfile::TempDir,
    pub(super) clock: Arc<ManualClock>,
    pub(super) engine: Arc<Engine>,
}

/// Index content, table behind it, digest.
pub(super) fn sealed(number: u32) -> (Vec<u8>, v1::IndexRef) {
    let index = number.to_le_bytes().repeat(5000);
    let table: Vec<u8> = index
        .chunks(16 << 10)
        .flat_map(|granule| *blake3::hash(granule).as_bytes())
        .collect();
    let named = [&(index.len() as u64).to_le_bytes()[..], &table].concat();
    let reference = v1::IndexRef {
        digest: blake3::hash(&named).as_bytes().to_vec(),
        len_bytes: index.len() as u64,
        packs: vec![pack(1_000_000 + number).to_vec()],
    };
    ([index, table].concat(), reference)
}

/// The pack that an index lies in.
pub(super) fn index_pack(number: u32) -> Pack {
    Pack(1_000_000 + number, 4096)
}

pub(super) fn wanted(packs: &[Pack]) -> Vec<v1::PackWanted> {
    packs
        .iter()
        .map(|Pack(number, len)| v1::PackWanted {
            pack: pack(*number).to_vec(),
            len: *len,
        })
        .collect()
}

impl World {
    /// An engine with one donor that lends `pages` pages of 4 KiB in epoch 1.
    pub(super) fn new(pages: u64) -> Self {
        let world = Self::empty();
        world.donor("d", 1, &[pages]);
        world
    }

    pub(super) fn empty() -> Self {
        Self::tuned(Tune::replicas(1))
    }

    /// An engine with no donors.
    pub(super) fn tuned(tune: Tune) -> Self {
        let folder = folder();
        let clock = Arc::new(ManualClock::default());
        clock.advance(1_000_000);
        let engine = open(&folder, &clock, tune);
        Self {
            tune,
            folder,
            clock,
            engine,
        }
    }

    /// Ends this engine and opens the directory again, as after a death: nothing is told to it.
    pub(super) fn restart(&mut self) {
        let nothing = Arc::new(ManualClock::default());
        let aside = folder();
        self.engine = open(&aside, &nothing, self.tune);
        self.engine = open(&self.folder, &self.clock, self.tune);
    }

    pub(super) fn path(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Time passes in small steps.
    pub(super) fn pass(&self, ms: u64) {
        for _ in 0..ms.div_ceil(500) {
            self.clock.advance(500);
            self.engine.tick().unwrap();
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.clock.now_ms()
    }

    pub(super) fn donor(&self, name: &str, epoch: u64, pages: &[u64]) -> u64 {
        self.try_donor(name, epoch, pages).unwrap().id
    }

    /// Donors of these names, all alike, in epoch 1.
    pub(super) fn donors(&self, names: &[&str], pages: &[u64]) {
        for name in names {
            self.donor(name, 1, pages);
        }
    }

    pub(super) fn try_donor(
        &self,
        name: &str,
        epoch: u64,
        pages: &[u64],
    ) -> Result<v1::DonorLease, Error> {
        let regions: Vec<(u32, u64)> = (0..).zip(pages.iter().copied()).collect();
        self.try_donor_in("", name, epoch, &regions)
    }

    /// As [`World::try_donor`], in a failure domain, with regions by number and pages.
    pub(super) fn try_donor_in(
        &self,
        domain: &str,
        name: &str,
        epoch: u64,
        regions: &[(u32, u64)],
    ) -> Result<v1::DonorLease, Error> {
        let donor = v1::Donor {
            name: name.into(),
            epoch,
            addresses: vec!["shm:/nowhere".into()],
            regions: regions
                .iter()
                .map(|(id, pages)| region(*id, *pages))
                .collect(),
            failure_domain: domain.into(),
            ..Default::default()
        };
        self.engine.register_donor(&v1::RegisterDonorRequest {
            donor: Some(donor),
            replaces_epoch: 0,
        })
    }

    pub(super) fn heartbeat(&self, id: u64, epoch: u64) -> v1::DonorLease {
        let donor = Some(v1::DonorRef { id, epoch });
        let beat = v1::DonorHeartbeat { donor };
        self.engine.donor_heartbeat(&beat).unwrap()
    }

    /// Tells that tasks were done, all in the same way.
    pub(super) fn copied(&self, id: u64, epoch: u64, tasks: &[u64], ok: bool) -> v1::DonorLease {
        let outcome = |task: &u64| v1::CopyOutcome {
            task: *task,
            ok,
            ..Default::default()
        };
        let report = v1::CopiedReport {
            donor: Some(v1::DonorRef { id, epoch }),
            outcomes: tasks.iter().map(outcome).collect(),
        };
        self.engine.copied(&report).unwrap()
    }

    /// Donors (by number, in epoch 1) make all copies that they are told to, for so long, a
    /// heartbeat each half second. Gives how many copies were made.
    pub(super) fn work(&self, donors: &[u64], ms: u64) -> usize {
        let mut done = 0;
        for _ in 0..ms.div_ceil(500) {
            self.pass(500);
            for id in donors {
                let mut lease = self.heartbeat(*id, 1);
                while !lease.tasks.is_empty() {
                    let tasks: Vec<u64> = lease.tasks.iter().map(|task| task.task).collect();
                    done += tasks.len();
                    lease = self.copied(*id, 1, &tasks, true);
                    self.books();
                }
            }
            self.books();
        }
        done
    }

    pub(super) fn resize(
        &self,
        id: u64,
        added: &[(u32, u64)],
        retired: &[u32],
        draining: bool,
    ) -> Result<v1::DonorLease, Error> {
        self.engine.donor_resize(&v1::ResizeDonor {
            donor: Some(v1::DonorRef { id, epoch: 1 }),
            added: added
                .iter()
                .map(|(id, pages)| region(*id, *pages))
                .collect(),
            retired: retired.to_vec(),
            draining,
        })
    }

    /// Donors that have a live replica of a pack, in order.
    pub(super) fn holders(&self, pack: Pack) -> Vec<u64> {
        let mut ids: Vec<u64> = self.locate(&[pack])[0].iter().map(|e| e.donor).collect();
        ids.sort_unstable();
        ids
    }

    /// Bytes that lie on each donor.
    pub(super) fn used(&self) -> Vec<(String, u64)> {
        let donors = self.engine.list_donors().unwrap().donors;
        donors
            .into_iter()
            .map(|donor| (donor.name, donor.used_bytes))
            .collect()
    }

    pub(super) fn begin(&self) -> v1::PullRef {
        self.begin_with(0)
    }

    pub(super) fn begin_with(&self, replicas: u32) -> v1::PullRef {
        let request = v1::BeginRequest {
            what: "image".into(),
            host: "host".into(),
            pid: 7,
            replicas,
        };
        let lease = self.engine.begin(&request).unwrap();
        v1::PullRef {
            pull: lease.pull,
            token: lease.token,
        }
    }

    pub(super) fn reserve(
        &self,
        pull: v1::PullRef,
        packs: &[Pack],
    ) -> Result<v1::ReserveReply, Error> {
        let request = v1::ReserveRequest {
            pull: Some(pull),
            packs: wanted(packs),
            avoid: Vec::new(),
        };
        match self.engine.reserve(&request, false)? {
            Reserving::Done(reply) => Ok(reply),
            Reserving::Wait => panic!("told not to wait"),
        }
    }

    pub(super) fn put_index(&self, pull: v1::PullRef, number: u32) -> Result<v1::IndexRef, Error> {
        let (content, reference) = sealed(number);
        let head = v1::IndexChunk {
            pull: Some(pull),
            digest: reference.digest.clone(),
            len_bytes: reference.len_bytes,
            content: Vec::new(),
        };
        let mut upload = self.engine.begin_index(&head)?;
        content
            .chunks(7000)
            .try_for_each(|chunk| upload.chunk(chunk))?;
        upload.finish()?;
        Ok(reference)
    }

    /// Reserves, puts the index, stages. The packs get an object each, of their own number.
    pub(super) fn stage(
        &self,
        pull: v1::PullRef,
        layer: &Layer,
    ) -> Result<(v1::ReserveReply, u32), Error> {
        let mut packs = layer.packs.clone();
        packs.push(index_pack(layer.index));
        let reply = self.reserve(pull, &packs)?;
        let index = self.put_index(pull, layer.index)?;
        let message = v1::Layer {
            diff_id: digest(b'l', layer.diff).to_vec(),
            index: Some(index),
            unpacked_bytes: 100,
            blobs: vec![v1::Blob {
                digest: digest(b'b', layer.diff).to_vec(),
                len_bytes: 5,
                media_type: "t".into(),
            }],
            ..Default::default()
        };
        let mut upload = self.engine.begin_layer(&v1::LayerHead {
            pull: Some(pull),
            layer: Some(message),
        })?;
        let named = layer.packs.iter().map(|Pack(number, len)| v1::PackObjects {
            pack: pack(*number).to_vec(),
            len: *len,
            objects: vec![v1::PackObject {
                object: digest(b'o', *number).to_vec(),
                offset: 0,
                len: 10,
            }],
        });
        self.engine
            .layer_packs(&mut upload, &named.collect::<Vec<_>>())?;
        Ok((reply, self.engine.finish_layer(&mut upload)?.number))
    }

    pub(super) fn commit_request(
        &self,
        pull: v1::PullRef,
        name: &str,
        manifest: u32,
        index: u32,
        diffs: &[u32],
    ) -> v1::CommitRequest {
        let document = |text: &str| v1::Document {
            content: text.into(),
            media_type: "application/json".into(),
        };
        v1::CommitRequest {
            pull: Some(pull),
            image: Some(v1::Image {
                registry: "r".into(),
                repository: "p".into(),
                tag: name.into(),
                manifest: digest(b'm', manifest).to_vec(),
                config: digest(b'c', manifest).to_vec(),
                diff_ids: diffs
                    .iter()
                    .map(|diff| digest(b'l', *diff).to_vec())
                    .collect(),
                index: Some(sealed(index).1),
                platform: "linux/amd64".into(),
                source: "docker://r/p".into(),
                ..Default::default()
            }),
            manifest: Some(document("manifest")),
            config: Some(document("config")),
            index_packs: wanted(&[index_pack(index)]),
            fence: 0,
        }
    }

    /// The last steps of a pull: the image's index, and the commit.
    pub(super) fn commit(
        &self,
        pull: v1::PullRef,
        name: &str,
        manifest: u32,
        index: u32,
        diffs: &[u32],
    ) -> Result<(v1::ReserveReply, v1::CommitReply), Error> {
        let reserved = self.reserve(pull, &[index_pack(index)])?;
        self.put_index(pull, index)?;
        let reply = self
            .engine
            .commit(&self.commit_request(pull, name, manifest, index, diffs))?;
        Ok((reserved, reply))
    }

    /// A whole pull of an image whose manifest and index have the number `image`.
    pub(super) fn pull(&self, name: &str, image: u32, layers: &[Layer]) -> Result<(), Error> {
        self.pull_with(name, image, layers, 0)
    }

    /// As [`World::pull`], with a number of replicas.
    pub(super) fn pull_with(
        &self,
        name: &str,
        image: u32,
        layers: &[Layer],
        replicas: u32,
    ) -> Result<(), Error> {
        let pull = self.begin_with(replicas);
        for layer in layers {
            self.stage(pull, layer)?;
        }
        let diffs: Vec<u32> = layers.iter().map(|layer| layer.diff).collect();
        self.reserve(pull, &[index_pack(image)])?;
        self.put_index(pull, image)?;
        let mut request = self.commit_request(pull, name, image, image, &diffs);
        if let Some(image) = &mut request.image {
            image.replicas = replicas;
        }
        self.engine.commit(&request).map(drop)
    }

    pub(super) fn remove(&self, name: &str) -> Result<v1::RemoveNameReply, Error> {
        let request = v1::RemoveNameRequest {
            registry: "r".into(),
            repository: "p".into(),
            tag: name.into(),
        };
        self.engine.remove_name(&request)
    }

    pub(super) fn locate(&self, packs: &[Pack]) -> Vec<Vec<v1::Extent>> {
        let packs = packs
            .iter()
            .map(|Pack(number, _)| pack(*number).to_vec())
            .collect();
        let reply = self.engine.locate(&v1::LocateRequest { packs }).unwrap();
        reply
            .packs
            .into_iter()
            .map(|replicas| replicas.extents)
            .collect()
    }

    pub(super) fn snapshot(&self) -> (Vec<v1::Image>, Vec<v1::Layer>) {
        let pages = self.engine.snapshot().unwrap();
        let images = pages.iter().flat_map(|page| page.images.clone()).collect();
        (
            images,
            pages.iter().flat_map(|page| page.layers.clone()).collect(),
        )
    }

    pub(super) fn names(&self) -> HashSet<String> {
        self.snapshot()
            .0
            .into_iter()
            .map(|image| image.tag)
            .collect()
    }

    /// The books, which have to balance.
    pub(super) fn books(&self) -> Books {
        sound(&self.engine)
    }

    pub(super) fn node(&self) -> u64 {
        self.engine
            .register_node(&v1::RegisterNodeRequest { name: "n".into() })
            .unwrap()
            .node
    }

    pub(super) fn beat(&self, node: u64, acknowledged: u64, held: &[u32]) -> v1::NodeLease {
        let held = held.to_vec();
        let request = v1::NodeHeartbeat {
            node,
            acknowledged_generation: acknowledged,
            held,
            used: Vec::new(),
        };
        self.engine.node_heartbeat(&request).unwrap()
    }
}

/// The books of an engine whose audit has to find nothing.
pub(super) fn sound(engine: &Engine) -> Books {
    let audit = engine.audit().unwrap();
    assert_eq!(audit.differences, []);
    assert_eq!((audit.found, audit.stored), (0, audit.kept));
    let books = engine.state.lock().space.books();
    assert!(books.balance(), "{books:?}");
    books
}

/// A region of some pages.
pub(super) fn region(id: u32, pages: u64) -> v1::Region {
    v1::Region {
        id,
        len: pages * 4096,
        ..Default::default()
    }
}

/// In memory where there is such a place: what is synced here is thrown away a moment later.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn open(folder: &tempfile::TempDir, clock: &Arc<ManualClock>, tune: Tune) -> Arc<Engine> {
    let options = Options {
        clock: clock.clone(),
        replicas: tune.replicas,
        hot_replicas: tune.hot_replicas,
        rebalance_mib_s: tune.rebalance_mib_s,
        ..Options::default()
    };
    Engine::open(folder.path(), options).unwrap()
}

/// A layer of `packs` packs of one page, all its own.
pub(super) fn layer(diff: u32, packs: u32) -> Layer {
    let packs = (0..packs)
        .map(|number| Pack(diff * 100 + number, 4096))
        .collect();
    Layer {
        diff,
        index: 5000 + diff,
        packs,
    }
}
