//! Node numbers: which view, and which node of it, in one number that needs no table.
//!
//! The upper 24 bits are the number of the view (a layer or a merged image, given by the catalogue
//! for good), the lower 40 its EROFS nid. So the kernel may hold a number for years, across
//! changes of the catalogue, and it still means the same file. View 0 is ours: the directories
//! above the views. There the root is 1, as FUSE wants it, an `erofs/X.erofs` file is told by the
//! view that it shows and the part of it, and everything else by a number made from its path. For
//! the many small directories of the engines' stores the number ends with what in the directory it
//! is, so that only the directories are held in memory.

use harbour_image::{index::Header, object::hash_object};

const NID_BITS: u32 = 40;
const NID_MAX: u64 = (1 << NID_BITS) - 1;
const VIEW_MAX: u32 = (1 << 24) - 1;
/// Control numbers from here on are made from paths.
const NAMED: u64 = 1 << 39;
/// Control numbers with this bit, below [`NAMED`], are EROFS files: the part, and the view's number.
const EROFS: u64 = 1 << 38;
const PART_SHIFT: u32 = 24;
/// Control numbers with this bit, below [`EROFS`], are directories made when they are looked at, and
/// what is in them: the low bits tell which.
const MADE: u64 = 1 << 37;
const MEMBER_BITS: u32 = 4;
const MEMBER_MAX: u64 = (1 << MEMBER_BITS) - 1;

/// A node as the kernel knows it: the number of a FUSE node and `st_ino`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(u64);

/// What a [`Node`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A node of the directories above the views.
    Control(u64),
    /// The EROFS file of the view with this number, or a part of it.
    Erofs(u32, Part),
    /// A node inside a view.
    View {
        /// Number of the layer or image.
        number: u32,
        /// EROFS nid in its index.
        nid: u64,
    },
}

/// What of an EROFS file a node shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// All of it.
    Whole,
    /// Metadata and small files, with a superblock that knows of [`Part::Bulk`].
    Head,
    /// The large files: what stands behind the head.
    Bulk,
}

impl Part {
    #[cfg(test)]
    const ALL: [Self; 3] = [Self::Whole, Self::Head, Self::Bulk];

    /// What its name ends with.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Whole => "erofs",
            Self::Head => "head",
            Self::Bulk => "bulk",
        }
    }

    /// Where it begins in the EROFS file with this header, and its length, in bytes.
    pub const fn span(self, header: &Header) -> (u64, u64) {
        match self {
            Self::Whole => (0, header.erofs_len()),
            Self::Head => (0, header.head_len()),
            Self::Bulk => (header.head_len(), header.data_len - header.bulk_at),
        }
    }
}

impl Node {
    /// The mount's root.
    pub const ROOT: Self = Self(1);

    /// The node with this number, as the kernel gives it.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The number.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// A node inside a view; `None` when view or nid do not fit, or the view is 0.
    pub const fn in_view(number: u32, nid: u64) -> Option<Self> {
        if number == 0 || number > VIEW_MAX || nid > NID_MAX {
            return None;
        }
        Some(Self((number as u64) << NID_BITS | nid))
    }

    /// The EROFS file of a view, or a part of it.
    pub const fn erofs(number: u32, part: Part) -> Self {
        Self(EROFS | (part as u64) << PART_SHIFT | (number & VIEW_MAX) as u64)
    }

    /// A control node of a number that [`control_number`] gave, or the root.
    pub(crate) const fn control(number: u64) -> Self {
        Self(number & NID_MAX)
    }

    /// What it stands for.
    pub const fn place(self) -> Place {
        let number = (self.0 >> NID_BITS) as u32;
        let nid = self.0 & NID_MAX;
        if number != 0 {
            Place::View { number, nid }
        } else if nid & NAMED == 0 && nid & EROFS != 0 {
            let part = match (nid >> PART_SHIFT) & 3 {
                1 => Part::Head,
                2 => Part::Bulk,
                _ => Part::Whole,
            };
            Place::Erofs(nid as u32 & VIEW_MAX, part)
        } else {
            Place::Control(nid)
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.place() {
            Place::Control(number) => write!(f, "control:{number:x}"),
            Place::Erofs(number, part) => write!(f, "{}:{number}", part.suffix()),
            Place::View { number, nid } => write!(f, "{number}:{nid}"),
        }
    }
}

/// The number of the control node at `path`, made from the path alone; the `attempt`-th choice
/// when earlier ones are taken by other paths.
pub(crate) fn control_number(path: &str, attempt: u32) -> u64 {
    if path.is_empty() {
        return Node::ROOT.0;
    }
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash_object(path.as_bytes()).id.0[..8]);
    NAMED | (u64::from_le_bytes(bytes).wrapping_add(u64::from(attempt)) & (NAMED - 1))
}

/// As [`control_number`], for a directory whose members are made when they are looked at. Its members
/// have the numbers behind it, up to 15.
pub(crate) fn made_number(path: &str, attempt: u32) -> u64 {
    let hash = control_number(path, 0).wrapping_add(u64::from(attempt)) << MEMBER_BITS;
    MADE | hash & (MADE - 1)
}

/// Takes the number of such a directory or of a member of it apart: the directory's number, and which
/// member, 0 for the directory itself. `None` for other control numbers.
pub(crate) const fn made(number: u64) -> Option<(u64, u64)> {
    if number & (NAMED | EROFS) != 0 || number & MADE == 0 {
        return None;
    }
    Some((number & !MEMBER_MAX, number & MEMBER_MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_are_taken_apart_as_they_were_put_together() {
        for number in [1, 2, 77, VIEW_MAX] {
            for nid in [0, 1, 36, NAMED, EROFS, NID_MAX] {
                let node = Node::in_view(number, nid).unwrap();
                assert_eq!(node.place(), Place::View { number, nid });
                assert_eq!(Node::from_raw(node.raw()), node);
            }
            for part in Part::ALL {
                assert_eq!(
                    Node::erofs(number, part).place(),
                    Place::Erofs(number, part)
                );
            }
        }
        assert_eq!(Node::in_view(0, 1), None);
        assert_eq!(Node::in_view(VIEW_MAX + 1, 1), None);
        assert_eq!(Node::in_view(1, NID_MAX + 1), None);
        assert_eq!(Node::ROOT.place(), Place::Control(1));
        assert_eq!(Node::ROOT.raw(), 1);
    }

    #[test]
    fn control_numbers_come_from_the_path_alone() {
        let number = control_number("images/docker.io", 0);
        assert_eq!(number, control_number("images/docker.io", 0));
        assert_ne!(number, control_number("images/docker.io", 1));
        assert_ne!(number, control_number("images", 0));
        assert_eq!(Node::control(number).place(), Place::Control(number));
        assert_eq!(control_number("", 0), 1);
    }

    #[test]
    fn members_of_made_directories_stand_behind_them() {
        for attempt in [0, 1, 1000] {
            let dir = made_number("store/overlay/0123", attempt);
            assert_eq!(made(dir), Some((dir, 0)));
            assert_eq!(made(dir + MEMBER_MAX), Some((dir, MEMBER_MAX)));
            assert_eq!(Node::control(dir).place(), Place::Control(dir));
            assert_ne!(dir, made_number("store/overlay/0123", attempt + 1));
        }
        for number in [1, control_number("images", 0)] {
            assert_eq!(made(number), None);
        }
        assert_eq!(made(Node::erofs(7, Part::Bulk).raw()), None);
        assert_eq!(made(Node::erofs(VIEW_MAX, Part::Whole).raw()), None);
    }
}
