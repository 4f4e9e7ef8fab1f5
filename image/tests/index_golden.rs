//! A fixed tree gives exactly the committed bytes, so that no change to the format goes unnoticed.
//! What was written once is read for as long as its version is: a change that is meant needs a new
//! version, beside `image/FORMAT.md` and a new golden file.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "index_support/seeds.rs"]
mod seeds;
#[path = "index_support/support.rs"]
mod support;
#[path = "index_support/walk.rs"]
#[allow(dead_code)]
mod walk;

use std::{fs, path::Path};

use harbour_image::index::{Index, ViewKind, load, merge, verify, write};

fn check(name: &str, bytes: &[u8]) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    let want = fs::read(&golden).unwrap_or_default();
    if let Some(at) = (0..want.len().max(bytes.len())).find(|at| want.get(*at) != bytes.get(*at)) {
        let found = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::write(&found, bytes).unwrap();
        panic!(
            "{name}: byte {at} differs from version 2; what was written is {}",
            found.display()
        );
    }
}

#[test]
fn a_layer_of_one_of_everything() {
    let builder = seeds::every_kind();
    let written = builder.write(ViewKind::Layer);
    check("layer-v2.idx", &written.bytes);
    let golden =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/layer-v2.idx")).unwrap();
    let index = Index::open(golden).unwrap();
    verify(&index).unwrap();
    let (tree, placement) = load(&index).unwrap();
    assert_eq!(
        support::flat(&tree, &placement),
        support::flat(&builder.tree, &builder.store.placement)
    );
    support::kernel::judge(&builder, ViewKind::Layer);
}

#[test]
fn the_image_merged_from_it() {
    let written = seeds::every_kind().write(ViewKind::Layer);
    let (tree, placement) = merge(&[Index::open(written.bytes).unwrap()]).unwrap();
    check(
        "image-v2.idx",
        &write(&tree, &placement, ViewKind::Image).unwrap().bytes,
    );
}
