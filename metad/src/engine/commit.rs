//! The transaction that makes an image visible, and the one that puts lost packs back.

use std::collections::{BTreeMap, HashSet};

use harbour_metad_client::v1;
use prost::Message;

use super::{
    Around, Effects, Engine,
    collect::collect,
    locks::Claims,
    options::REPLICAS_MAX,
    pulls::{End, end},
    reserve::wanted,
    stage::next_number,
    state::State,
};
use crate::{
    error::{Error, Hash, hash, text},
    locks::{Key, Request},
    store::{DoneRow, ImageRow, LayerRow, NameRow, Sync, Tx},
};

/// Layers of one image.
const LAYERS_MAX: usize = 2048;

/// A checked commit.
#[derive(Debug)]
struct NewImage {
    name: NameRow,
    source: String,
    row: ImageRow,
    index_len: u64,
    diff_ids: Vec<Hash>,
    index_packs: Vec<(Hash, u32)>,
    manifest: v1::Document,
    config: v1::Document,
}

/// What a commit does with one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    /// Row that the image is made of.
    pub(super) layer: u64,
    /// Row whose packs the image's index refers to: the pull's own where it staged one.
    packs_of: u64,
}

impl Engine {
    /// Makes the image, its staged layers and its name visible, all or nothing.
    pub fn commit(&self, request: &v1::CommitRequest) -> Result<v1::CommitReply, Error> {
        let image = new_image(request, self.options.clock.unix_ms())?;
        let asked = digest_of("commit", request);
        self.end_with(
            request.pull.as_ref(),
            asked,
            Around("commit.before", "commit.after"),
            |tx, effects, claims, (pull, replicas)| {
                if request.fence > 0 {
                    claims.commit(pull, &Key::Image(image.row.manifest), request.fence)?;
                }
                self.commit_image(tx, effects, pull, replicas, &image)
            },
        )
    }

    /// Makes what a pull has written for lost packs live.
    pub fn commit_refill(
        &self,
        request: &v1::CommitRefillRequest,
    ) -> Result<v1::CommitReply, Error> {
        let packs = wanted(&request.packs)?;
        let asked = digest_of("refill", request);
        let around = Around("commit_refill.before", "commit_refill.after");
        self.end_with(
            request.pull.as_ref(),
            asked,
            around,
            |tx, effects, _, (pull, asked_replicas)| {
                let mut rows = HashSet::new();
                for (digest, len) in &packs {
                    let id = pinned(tx, pull, digest, *len)?;
                    // One that no layer knows any more is given back with the pull.
                    if tx.pack_of(id)?.is_some_and(|pack| pack.visible) {
                        rows.insert(id);
                    }
                }
                self.attach(tx, effects, pull, asked_replicas, &rows)
            },
        )
    }

    /// Ends a pull with `work`, which is told the pull and its replicas; answers a repetition as the
    /// first time.
    pub(super) fn end_with(
        &self,
        reference: Option<&v1::PullRef>,
        asked: Hash,
        around: Around,
        work: impl FnOnce(&Tx<'_>, &mut Effects, &mut Claims<'_>, (u64, u32)) -> Result<(), Error>,
    ) -> Result<v1::CommitReply, Error> {
        let mut state = self.lock();
        if let Some(reply) = repeated(&state, reference, &asked)? {
            return Ok(reply);
        }
        let now_ms = self.now_ms();
        let pull = state.pull(reference, now_ms)?;
        let token = reference.map_or(0, |reference| reference.token);
        let reach = self.reach(&state);
        let replicas = self.replicas_of_pull(&state, pull);
        let ended = |tx: &Tx<'_>, effects: &mut Effects, claims: &mut Claims<'_>| {
            work(tx, effects, claims, (pull, replicas))?;
            let packs = end(tx, effects, pull, End::Told)?;
            claims.apply(Request::Close { owner: pull });
            collect(tx, effects, &reach, packs)?;
            effects.touch();
            let generation = effects.sealed_generation(tx)?;
            tx.add_done(
                pull,
                &DoneRow {
                    token,
                    request: asked,
                    generation,
                },
            )?;
            Ok(generation)
        };
        let generation = self.change_locked(&mut state, Sync::Full, Some(around), ended)?;
        state.collect = true;
        drop(state);
        self.tell_space_freed();
        Ok(v1::CommitReply { generation })
    }

    fn commit_image(
        &self,
        tx: &Tx<'_>,
        effects: &mut Effects,
        pull: u64,
        asked_replicas: u32,
        image: &NewImage,
    ) -> Result<(), Error> {
        if tx.index_len(&image.row.index)? != Some(image.index_len) {
            return Err(Error::Refused(format!(
                "index {} of {} bytes is not on disk: put it first",
                hex::encode(image.row.index),
                image.index_len
            )));
        }
        let mut packs = HashSet::new();
        for (digest, len) in &image.index_packs {
            packs.insert(pinned(tx, pull, digest, *len)?);
        }
        let index_packs = packs.clone();
        let unique: BTreeMap<Hash, ()> = image
            .diff_ids
            .iter()
            .map(|diff_id| (*diff_id, ()))
            .collect();
        for diff_id in unique.keys() {
            if let Some(staged) = tx
                .staged_layer(pull, diff_id)?
                .filter(|staged| staged.complete)
            {
                packs.extend(tx.packs_of_layer(staged.id)?);
            }
        }
        // First the packs, so that it is known which layers are whole.
        self.attach(tx, effects, pull, asked_replicas, &packs)?;
        let mut chosen = BTreeMap::new();
        for diff_id in unique.keys() {
            chosen.insert(
                *diff_id,
                choose_layer(tx, pull, diff_id, image.row.committed_ms)?,
            );
        }
        let id = put_image(tx, image, &chosen, &index_packs)?;
        tx.put_name(&image.name, id, &image.source)
    }

    /// Makes these packs known, and the extents that this pull has written for them live, as far
    /// as replicas are wanted, each on a donor of its own; the others stay reserved and end with
    /// the pull.
    pub(super) fn attach(
        &self,
        tx: &Tx<'_>,
        effects: &mut Effects,
        pull: u64,
        asked: u32,
        packs: &HashSet<u64>,
    ) -> Result<(), Error> {
        for pack in packs {
            tx.show_pack(*pack)?;
        }
        for extent in tx.extents_of_pull(pull)? {
            if !packs.contains(&extent.pack) {
                continue;
            }
            let want = asked.max(tx.wanted_replicas(extent.pack, self.options.replicas)?);
            let there = tx.extents_of_pack(extent.pack)?;
            let same_donor = there
                .iter()
                .any(|other| other.pull.is_none() && other.place.donor == extent.place.donor);
            if !same_donor && tx.live_replicas(extent.pack)? < want {
                effects.commit(tx, &extent)?;
            }
        }
        Ok(())
    }

    /// Replicas of each pack that a pull writes: what it asked for, else the default.
    pub(super) fn replicas_of_pull(&self, state: &State, pull: u64) -> u32 {
        let asked = state.pulls.get(&pull).map_or(0, |pull| pull.replicas);
        if asked == 0 {
            self.options.replicas
        } else {
            asked
        }
    }
}

/// The pack of this name, which this pull must hold on to.
fn pinned(tx: &Tx<'_>, pull: u64, digest: &Hash, len: u32) -> Result<u64, Error> {
    match tx.pack(digest)? {
        Some(pack) if pack.len != len => Err(Error::Invalid(format!(
            "pack {} is {} bytes long, not {len}",
            hex::encode(digest),
            pack.len
        ))),
        Some(pack) if tx.pinned_by(pull, pack.id)? => Ok(pack.id),
        _ => Err(Error::Refused(format!(
            "pack {} was neither reserved nor found by this pull",
            hex::encode(digest)
        ))),
    }
}

/// Decides between the layer that a pull staged and the one that is visible. The first wins, for
/// its number is in use, unless it has lost content and the new one has another index.
pub(super) fn choose_layer(
    tx: &Tx<'_>,
    pull: u64,
    diff_id: &Hash,
    committed_ms: i64,
) -> Result<Chosen, Error> {
    let staged = tx
        .staged_layer(pull, diff_id)?
        .filter(|staged| staged.complete);
    let visible = tx.layer(diff_id)?;
    match (staged, visible) {
        (Some(staged), None) => {
            show(tx, &staged, committed_ms)?;
            Ok(Chosen {
                layer: staged.id,
                packs_of: staged.id,
            })
        }
        (Some(staged), Some(visible))
            if staged.index == visible.index || tx.layer_whole(visible.id)? =>
        {
            tx.move_layer_uses(staged.id, visible.id, false)?;
            Ok(Chosen {
                layer: visible.id,
                packs_of: staged.id,
            })
        }
        (Some(staged), Some(visible)) => {
            tx.retire_layer(visible.id)?;
            show(tx, &staged, committed_ms)?;
            tx.move_layer_uses(visible.id, staged.id, true)?;
            Ok(Chosen {
                layer: staged.id,
                packs_of: staged.id,
            })
        }
        (None, Some(visible)) => Ok(Chosen {
            layer: visible.id,
            packs_of: visible.id,
        }),
        (None, None) => Err(Error::Refused(format!(
            "layer {} is neither committed nor staged by this pull",
            hex::encode(diff_id)
        ))),
    }
}

/// Makes a staged layer visible. The number that it was given may be that of a layer with the same
/// index, which was replaced meanwhile and is still held by a reader: then it gets a new one.
fn show(tx: &Tx<'_>, staged: &LayerRow, committed_ms: i64) -> Result<(), Error> {
    let number = if tx.number_in_use(staged.number)? {
        next_number(tx)?
    } else {
        staged.number
    };
    tx.show_layer(staged.id, number, committed_ms)
}

/// Writes the image down, unless the same is there already. Gives its row.
fn put_image(
    tx: &Tx<'_>,
    image: &NewImage,
    chosen: &BTreeMap<Hash, Chosen>,
    index_packs: &HashSet<u64>,
) -> Result<u64, Error> {
    let earlier = tx.image(&image.row.manifest)?;
    if let Some((id, index)) = earlier {
        if image.row.replicas > 0 {
            tx.set_image_replicas(id, image.row.replicas)?;
        }
        if index == image.row.index || tx.image_whole(id)? {
            return Ok(id);
        }
        tx.retire_image(id)?;
    }
    let content = |document: &v1::Document| (document.content.clone(), document.media_type.clone());
    for (digest, (content, media_type)) in [
        (&image.row.manifest, content(&image.manifest)),
        (&image.row.config, content(&image.config)),
    ] {
        tx.add_document(digest, &content, &media_type)?;
    }
    let layers: Vec<u64> = image
        .diff_ids
        .iter()
        .filter_map(|diff_id| chosen.get(diff_id))
        .map(|layer| layer.layer)
        .collect();
    let mut row = ImageRow {
        number: next_number(tx)?,
        ..image.row.clone()
    };
    if let (Some((id, _)), 0) = (earlier, row.replicas) {
        row.replicas = tx.image_replicas(id)?;
    }
    let id = tx.add_image(&row, &layers)?;
    for layer in chosen.values() {
        tx.add_packs_of_layer(id, layer.packs_of)?;
    }
    for pack in index_packs {
        tx.add_image_pack(id, *pack)?;
    }
    if let Some((earlier, _)) = earlier {
        tx.move_names(earlier, id)?;
    }
    Ok(id)
}

/// The answer of a pull that has ended with the same request.
fn repeated(
    state: &State,
    reference: Option<&v1::PullRef>,
    asked: &Hash,
) -> Result<Option<v1::CommitReply>, Error> {
    let Some(reference) = reference else {
        return Ok(None);
    };
    let Some(done) = state.writer.read().done(reference.pull)? else {
        return Ok(None);
    };
    if done.token == reference.token && done.request == *asked {
        return Ok(Some(v1::CommitReply {
            generation: done.generation,
        }));
    }
    Err(Error::Refused(format!(
        "pull {:x} was committed with another request",
        reference.pull
    )))
}

pub(super) fn digest_of(kind: &str, request: &impl Message) -> Hash {
    *blake3::Hasher::new()
        .update(kind.as_bytes())
        .update(&request.encode_to_vec())
        .finalize()
        .as_bytes()
}

fn new_image(request: &v1::CommitRequest, now_unix_ms: i64) -> Result<NewImage, Error> {
    let missing = |what: &str| Error::Invalid(format!("the commit has no {what}"));
    let image = request.image.as_ref().ok_or_else(|| missing("image"))?;
    let index = image.index.as_ref().ok_or_else(|| missing("index"))?;
    let name = name_row(&image.registry, &image.repository, &image.tag)?;
    let index_packs = wanted(&request.index_packs)?;
    let listed = super::find::hashes(&index.packs, 8192, "packs of an index")?;
    if let Some(unknown) = listed
        .iter()
        .find(|pack| !index_packs.iter().any(|(digest, _)| digest == *pack))
    {
        return Err(Error::Invalid(format!(
            "pack {} of the index has no length",
            hex::encode(unknown)
        )));
    }
    Ok(NewImage {
        name,
        source: text(&image.source, 4096, "the source")?.to_owned(),
        row: ImageRow {
            number: 0,
            manifest: hash(&image.manifest, "a manifest's digest")?,
            config: hash(&image.config, "a config's digest")?,
            index: hash(&index.digest, "an index's digest")?,
            index_packs: listed,
            unpacked: image.unpacked_bytes,
            platform: text(&image.platform, 255, "the platform")?.to_owned(),
            committed_ms: now_unix_ms,
            replicas: replicas(image.replicas)?,
        },
        index_len: index.len_bytes,
        diff_ids: super::find::hashes(&image.diff_ids, LAYERS_MAX, "layers of an image")?,
        index_packs,
        manifest: document(
            request
                .manifest
                .as_ref()
                .ok_or_else(|| missing("manifest"))?,
        )?,
        config: document(request.config.as_ref().ok_or_else(|| missing("config"))?)?,
    })
}

/// A number of replicas that a request may ask for.
pub(super) fn replicas(asked: u32) -> Result<u32, Error> {
    if asked > REPLICAS_MAX {
        return Err(Error::Invalid(format!(
            "{asked} replicas are asked for, at most {REPLICAS_MAX} are kept"
        )));
    }
    Ok(asked)
}

fn document(document: &v1::Document) -> Result<v1::Document, Error> {
    text(&document.media_type, 255, "a media type")?;
    Ok(document.clone())
}

/// Reads a name out of a message.
pub(super) fn name_row(registry: &str, repository: &str, tag: &str) -> Result<NameRow, Error> {
    for (part, what) in [
        (registry, "the registry"),
        (repository, "the repository"),
        (tag, "the tag"),
    ] {
        text(part, 512, what)?;
    }
    if repository.is_empty() || tag.is_empty() {
        return Err(Error::Invalid("a name needs a repository and a tag".into()));
    }
    Ok(NameRow {
        registry: registry.into(),
        repository: repository.into(),
        tag: tag.into(),
    })
}
