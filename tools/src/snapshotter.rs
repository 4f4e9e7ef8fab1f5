//! `harbour snapshotter`: containerd's proxy snapshotter, for containerd, Kubernetes' CRI and Docker.
//!
//! A snapshot of an image's layer that the mount of this host shows takes nothing of the host's disk: when
//! containerd is about to unpack the layer it is told that it has it already. What is written on top of it
//! (containers, builds) lies in a directory of its own, as with containerd's overlayfs snapshotter.
//!
//! [`service`] speaks containerd's protocol, and `layers` finds layers for it; [`table`] has the snapshots and their rules, and [`journal`]
//! keeps them on the disk; [`known`] follows metad's catalogue and tells layers by chain ID; [`bring`] pulls
//! images that are missing; [`mounts`] says what containerd is to mount; [`uses`] has metad keep what
//! snapshots stand on; [`filter`] reads containerd's filters.

pub mod bring;
pub mod figures;
pub mod filter;
pub mod journal;
pub mod known;
mod layers;
pub mod mounts;
pub mod serve;
pub mod service;
pub mod store;
pub mod table;
pub mod usage;
pub mod uses;

/// Messages of containerd's protocol, generated from `tools/proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used
)]
pub mod proto {
    /// Package `containerd`.
    pub mod containerd {
        /// Package `containerd.types`.
        pub mod types {
            tonic::include_proto!("containerd.types");
        }
        /// Package `containerd.services`.
        pub mod services {
            /// Package `containerd.services.snapshots`.
            pub mod snapshots {
                /// Package `containerd.services.snapshots.v1`.
                pub mod v1 {
                    tonic::include_proto!("containerd.services.snapshots.v1");
                }
            }
        }
    }
    pub use containerd::{services::snapshots::v1, types};
}

/// The label by which containerd names what it is about to unpack: the layer's chain ID (OCI image
/// specification, "Layer ChainID").
pub const LABEL_REF: &str = "containerd.io/snapshot.ref";

/// The label with the reference of the image that is pulled, where the client tells it.
pub const LABEL_IMAGE: &str = "containerd.io/snapshot/cri.image-ref";

/// The label with the digest of that image's manifest.
pub const LABEL_MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// The label with the digest of the layer's blob.
pub const LABEL_LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
