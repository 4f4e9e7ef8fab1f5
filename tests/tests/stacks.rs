//! Random stacks of layers, pulled as images: what is served equals a model of the OCI rules
//! written to disk, and a kernel overlay of the layers written to disk.
//!
//! A failure prints the stack it shrank to, and the seed goes to `stacks.regressions`, which is
//! tried first from then on. `PROPTEST_CASES` sets how many stacks are tried.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "stacks/model.rs"]
mod model;
#[path = "stacks/plant.rs"]
mod plant;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use harbour_tests::{
    cluster::Cluster,
    layers::{self, Blob, Layout},
    overlay::Overlay,
    tree::{Links, Rules, Tree},
};
use model::{Layer, merge};
use proptest::{
    prelude::ProptestConfig,
    test_runner::{FileFailurePersistence, TestCaseError, TestRunner},
};

const CASES: u32 = 24;

#[test]
fn random_stacks_equal_the_model_and_a_kernel_overlay() {
    let cluster = Cluster::start("256MiB").unwrap();
    let number = AtomicU32::new(0);
    let tried = try_stacks(CASES, |stack| {
        let tag = format!("stack-{}", number.fetch_add(1, Ordering::Relaxed));
        check(&cluster, &tag, stack)
    });
    tried.unwrap_or_else(|e| panic!("{e}\n{}", cluster.logs()));
}

/// Without anything of ours: the judges of the test above agree with each other.
#[test]
fn the_model_agrees_with_the_kernel() {
    try_stacks(2 * CASES, |stack| {
        let dir = tempfile::tempdir()?;
        Planted::new(stack, dir.path())?;
        Ok(())
    })
    .unwrap_or_else(|e| panic!("{e}"));
}

fn try_stacks(cases: u32, test: impl Fn(&[Layer]) -> anyhow::Result<()>) -> Result<(), String> {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|c| c.parse().ok())
        .unwrap_or(cases);
    let config = ProptestConfig {
        cases,
        max_shrink_iters: 200,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            "tests/stacks.regressions",
        ))),
        ..ProptestConfig::default()
    };
    let outcome = TestRunner::new(config).run(&model::stacks(), |stack| {
        test(&stack).map_err(|e| TestCaseError::fail(format!("{e:#}")))
    });
    outcome.map_err(|e| e.to_string())
}

/// A stack written to disk: merged as the model says, and layer by layer under a kernel overlay.
struct Planted {
    merged: Tree,
    /// From the bottom up.
    layers: Vec<PathBuf>,
    overlaid: Tree,
}

impl Planted {
    fn new(stack: &[Layer], dir: &std::path::Path) -> anyhow::Result<Self> {
        let merged = dir.join("merged");
        plant::merged(&merge(stack), &merged)?;
        let merged = Tree::scan(&merged)?;
        let layers: Vec<_> = (0..stack.len())
            .map(|n| dir.join(format!("layer-{n}")))
            .collect();
        for (layer, path) in stack.iter().zip(&layers) {
            plant::layer(layer, path)?;
        }
        let lowers: Vec<_> = layers.iter().rev().cloned().collect();
        let overlay = Overlay::read_only(&lowers)?;
        let overlaid = Tree::scan(&overlay.path())?.without_ghosts();
        let rules = Rules {
            links: Links::Names,
            dir_links: false,
            loose_dirs: stack.iter().flat_map(Layer::implied).collect(),
            ..Rules::default()
        };
        overlaid
            .compare(&merged, &rules)?
            .into_result("kernel overlay, model", 10)?;
        Ok(Self {
            merged,
            layers,
            overlaid,
        })
    }
}

fn check(cluster: &Cluster, tag: &str, stack: &[Layer]) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let planted = Planted::new(stack, dir.path())?;
    let mut layout = Layout::create(&dir.path().join("layout"))?;
    let tars: Vec<_> = stack.iter().map(|l| layers::tar(&l.entries())).collect();
    let blobs = tars
        .iter()
        .map(|t| Blob::gzip(t))
        .collect::<anyhow::Result<Vec<_>>>()?;
    layout.blobs(tag, &blobs)?;
    let image = cluster.pull(&layout.reference(tag))?;

    let compare = |what: &str, a: &Tree, b: &PathBuf| -> anyhow::Result<()> {
        a.compare(&Tree::scan(b)?, &Rules::default())?
            .into_result(what, 10)
            .map(drop)
    };
    compare("model, rootfs", &planted.merged, &cluster.rootfs(&image)?)?;
    for (path, blob) in planted.layers.iter().zip(&blobs) {
        compare(
            "model, layer",
            &Tree::scan(path)?,
            &cluster.layer(&blob.diff_id),
        )?;
    }
    let ours: Vec<_> = blobs
        .iter()
        .rev()
        .map(|b| cluster.layer(&b.diff_id))
        .collect();
    let overlay = Overlay::read_only(&ours)?;
    // The content of the overlay that is gone by now is that of the layers, compared above.
    let overlaid = Tree::scan(&overlay.path())?.without_ghosts();
    let rules = Rules {
        content: false,
        ..Rules::default()
    };
    planted
        .overlaid
        .compare(&overlaid, &rules)?
        .into_result("overlays of planted layers, of ours", 10)?;
    drop(overlay);
    cluster.harbour([
        "rm",
        &format!("{}/{}:{}", image.registry, image.repository, image.tag),
    ])?;
    Ok(())
}
