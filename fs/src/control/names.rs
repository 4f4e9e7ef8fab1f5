//! Short names of views.

use std::collections::{HashMap, HashSet};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use harbour_image::digest::Digest;

use crate::source::Snapshot;

/// Digits of a name that clashes with no other.
const SHORT: usize = 12;
/// Characters of a link's name that clashes with no other: 36 bits.
const LINK: usize = 6;
/// Digits more at each clash.
const STEP: usize = 4;

/// Names of all views of `snapshot`, keeping those in `before`.
pub(super) fn assign(snapshot: &Snapshot, before: &HashMap<u32, String>) -> HashMap<u32, String> {
    let layers = snapshot
        .layers
        .iter()
        .map(|layer| (layer.number, layer.diff_id));
    let images = snapshot
        .images
        .iter()
        .map(|image| (image.number, image.manifest));
    let mut views: Vec<(u32, Digest)> = layers.chain(images).collect();
    views.sort_unstable();
    views.dedup_by_key(|view| view.0);

    let names = views.iter().map(|(number, digest)| (*number, digest.hex()));
    shorten(names.collect(), SHORT, before)
}

/// Names of all layers of `snapshot` that are shorter still, keeping those in `before`: 120 of them
/// have to fit the options of one mount.
pub(super) fn assign_links(
    snapshot: &Snapshot,
    before: &HashMap<u32, String>,
) -> HashMap<u32, String> {
    let mut layers: Vec<(u32, String)> = (snapshot.layers.iter())
        .map(|layer| {
            (
                layer.number,
                URL_SAFE_NO_PAD.encode(layer.diff_id.as_bytes()),
            )
        })
        .collect();
    layers.sort_unstable();
    layers.dedup_by_key(|layer| layer.0);
    shorten(layers, LINK, before)
}

/// Cuts names down to `short` characters, and those that clash to more. Views come by number.
fn shorten(
    views: Vec<(u32, String)>,
    short: usize,
    before: &HashMap<u32, String>,
) -> HashMap<u32, String> {
    let mut names = HashMap::with_capacity(views.len());
    let mut taken = HashSet::with_capacity(views.len());
    for (number, whole) in &views {
        let kept = before
            .get(number)
            .filter(|name| whole.starts_with(name.as_str()));
        if let Some(kept) = kept.filter(|name| taken.insert((*name).clone())) {
            names.insert(*number, kept.clone());
        }
    }
    for (number, whole) in views {
        names.entry(number).or_insert_with(|| {
            let name = (short..=whole.len())
                .step_by(STEP)
                .map(|len| whole[..len].to_owned())
                .find(|name| !taken.contains(name))
                // The same digest twice: nothing in it tells them apart, so the number has to.
                .unwrap_or_else(|| format!("{whole}-{number}"));
            taken.insert(name.clone());
            name
        });
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{IndexRef, LayerEntry};

    fn layer(number: u32, digest: [u8; 32]) -> LayerEntry {
        let index = IndexRef {
            digest: [0; 32],
            len: 0,
            packs: Vec::new(),
        };
        LayerEntry {
            diff_id: Digest::from_bytes(digest),
            number,
            index,
            blobs: Vec::new(),
            unpacked_bytes: 0,
        }
    }

    #[test]
    fn clashing_names_grow_and_stay() {
        let one = [1; 32];
        let mut two = [1; 32];
        two[6] = 2;
        let mut three = [1; 32];
        three[31] = 3;
        let layers = vec![
            layer(9, two),
            layer(4, one),
            layer(12, three),
            layer(13, one),
        ];
        let mut snapshot = Snapshot {
            layers,
            ..Snapshot::default()
        };
        let names = assign(&snapshot, &HashMap::new());
        assert_eq!(names[&4], "010101010101");
        assert_eq!(names[&9], "0101010101010201");
        assert_eq!(names[&12], "0101010101010101");
        assert_eq!(names[&13], "01010101010101010101");
        snapshot.layers.remove(1);
        let later = assign(&snapshot, &names);
        assert_eq!(later[&9], names[&9], "a name stays when the other is gone");
        assert!(!later.contains_key(&4));
        snapshot.layers.push(layer(20, one));
        let later = assign(&snapshot, &later);
        assert_eq!(later[&20], "010101010101");
        let links = assign_links(&snapshot, &HashMap::new());
        assert_eq!((links[&9].len(), links[&12].len()), (6, 10));
        assert!(links[&12].starts_with(&links[&9]));
    }

    #[test]
    fn one_digest_under_many_numbers_has_as_many_names() {
        let layers = (1..=20).map(|number| layer(number, [5; 32])).collect();
        let names = assign(
            &Snapshot {
                layers,
                ..Snapshot::default()
            },
            &HashMap::new(),
        );
        let distinct: HashSet<&String> = names.values().collect();
        assert_eq!(distinct.len(), 20);
    }
}
