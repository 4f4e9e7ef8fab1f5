//! Where the bytes of a file come from.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use harbour_image::{
    index::{FileType, Nid, What},
    object::PackId,
};
use serde::Serialize;

use crate::{
    budget::Budget,
    error::{Error, Result},
    inode::{Node, Place},
    ops::Fs,
    source::SourceError,
    view::Shows,
};

/// Segments that are looked at; of longer files the beginning is told.
const SEGMENTS_MAX: usize = 65_536;
/// How much of a file is looked at in one go, in bytes.
const STEP: u64 = 256 << 20;
/// Packs whose places are asked for.
const PACKS_MAX: usize = 1024;

/// What is known of a file's bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Why {
    /// Number of the layer or image that shows it.
    pub view: u32,
    /// Diff ID, when it is a layer.
    pub layer: Option<String>,
    /// A name of the image, when it is one.
    pub image: Option<String>,
    /// Manifest digest, when it is an image.
    pub manifest: Option<String>,
    /// EROFS nid; none for the EROFS file of the view.
    pub nid: Option<u64>,
    /// Type of the node.
    pub kind: String,
    /// Length in bytes.
    pub size: u64,
    /// Bytes of it that are holes.
    pub hole_bytes: u64,
    /// Objects that it is made of, counted as often as they occur.
    pub objects: u64,
    /// Packs that these lie in.
    pub packs: u64,
    /// Packs of those that no donor has now: a read brings them back from the source.
    pub packs_missing: u64,
    /// Replicas of those packs, by donor.
    pub donors: Vec<DonorShare>,
    /// Whether the file was too long to look at all of it.
    pub partial: bool,
    /// Whether granules are checked.
    pub verified: bool,
    /// Bytes of content read through this view since the mount.
    pub view_read_bytes: u64,
    /// Why donors could not be told.
    pub trouble: Option<String>,
}

/// What one donor has of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DonorShare {
    /// Its number.
    pub donor: u64,
    /// How its bytes travel.
    pub transport: String,
    /// Why they travel no faster way that might be there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remark: Option<String>,
    /// How many of the packs it has.
    pub packs: u64,
}

impl Why {
    /// As `user.harbour.why` has it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_else(|error| error.to_string().into_bytes())
    }
}

impl Fs {
    /// Where the bytes of `node` come from. Control nodes have nothing to tell.
    pub fn why(&self, node: Node) -> Result<Why> {
        let (number, nid) = match node.place() {
            Place::Control(_) => return Err(Error::NoAttribute),
            Place::Erofs(number, _) => (number, None),
            Place::View { number, nid } => (number, Some(nid)),
        };
        let (view, opened) = self.view(number, node)?;
        let index = opened.index(self.outside());
        let mut why = Why {
            view: number,
            nid,
            kind: "file".into(),
            verified: self.outside().config.verify,
            view_read_bytes: view.read_bytes.load(Ordering::Relaxed),
            ..Why::default()
        };
        match &view.shows {
            Shows::Layer(diff_id) => why.layer = Some(diff_id.to_string()),
            Shows::Image { manifest, name } => {
                why.image = Some(name.clone());
                why.manifest = Some(manifest.to_string());
            }
        }
        let range = match nid {
            None => {
                why.size = opened.header.erofs_len();
                Some((opened.header.meta_len, opened.header.data_len))
            }
            Some(nid) => {
                let inode = index.inode(Nid(nid)).map_err(|error| view.error(error))?;
                why.kind = kind_name(inode.file_type).into();
                why.size = inode.size;
                inode.data_offset.map(|offset| (offset, inode.size))
            }
        };
        let mut packs: BTreeMap<u32, PackId> = BTreeMap::new();
        if let Some((offset, len)) = range {
            let mut at = 0;
            let mut seen = 0;
            while at < len && seen < SEGMENTS_MAX {
                let step = STEP.min(len - at);
                for segment in index
                    .segments(offset + at, step)
                    .map_err(|error| view.error(error))?
                {
                    seen += 1;
                    match segment.what {
                        What::Hole => why.hole_bytes += segment.len,
                        What::Object(part) => {
                            // A part cut by a step was counted with its beginning.
                            why.objects += u64::from(part.skip == 0);
                            packs.insert(part.pack_number, part.pack.id);
                        }
                    }
                }
                at += step;
            }
            why.partial = at < len || packs.len() > PACKS_MAX;
        }
        why.packs = packs.len() as u64;
        let packs: Vec<PackId> = packs.into_values().take(PACKS_MAX).collect();
        if let Err(error) = self.tell_donors(&packs, &mut why) {
            why.trouble = Some(crate::errno::chain(&error));
        }
        Ok(why)
    }

    /// Where the bytes of the file at `path` come from, from the mount's root. Symbolic links are
    /// not followed.
    pub fn why_path(&self, path: &std::path::Path) -> Result<Why> {
        use std::os::unix::ffi::OsStrExt;
        let mut node = Node::ROOT;
        let names = path.components().filter_map(|component| match component {
            std::path::Component::Normal(name) => Some(name.as_bytes()),
            std::path::Component::ParentDir => Some(&b".."[..]),
            _ => None,
        });
        for name in names {
            let found = self.lookup(node, name)?;
            let attr = found.attr.ok_or(Error::NotFound)?;
            // The kernel was not given this one.
            self.forget(attr.node, 1);
            node = attr.node;
        }
        self.why(node)
    }

    fn tell_donors(&self, packs: &[PackId], why: &mut Why) -> std::result::Result<(), SourceError> {
        if packs.is_empty() {
            return Ok(());
        }
        let outside = self.outside();
        let places = outside
            .catalogue
            .locate(packs, false, Budget::current().deadline)?;
        let mut donors: BTreeMap<u64, DonorShare> = BTreeMap::new();
        for extents in places {
            why.packs_missing += u64::from(extents.is_empty());
            for extent in extents {
                let share = donors.entry(extent.donor).or_insert_with(|| DonorShare {
                    donor: extent.donor,
                    transport: outside.pool.describe(extent.donor),
                    remark: outside.pool.remark(extent.donor),
                    packs: 0,
                });
                share.packs += 1;
            }
        }
        why.donors = donors.into_values().collect();
        Ok(())
    }
}

const fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::File => "file",
        FileType::Dir => "directory",
        FileType::Symlink => "symlink",
        FileType::Char => "character device",
        FileType::Block => "block device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
    }
}
