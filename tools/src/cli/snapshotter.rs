//! The command line of the snapshotter.

use clap::Args;

use crate::config::SnapshotterKeys;

/// `harbour snapshotter`
#[derive(Debug, Args)]
#[command(
    after_help = "In /etc/containerd/config.toml (harbour setup containerd writes it):\n  \
    [proxy_plugins.harbour]\n    type = \"snapshot\"\n    address = \"/run/harbour/snapshotter.sock\"\n\
    Then: ctr image pull --snapshotter harbour IMAGE"
)]
pub struct SnapshotterArgs {
    /// Keys of the snapshotter.
    #[command(flatten)]
    pub keys: SnapshotterKeys,
}
