//! Which NUMA node a region's pages come from: the one with the most room when the region is made.
//! Left to itself the kernel takes them where the writing thread happens to run, which fills one node
//! while the other lies idle, and has programs there reach across for their own memory.

use std::{fs, path::Path};

use super::Memory;
use crate::sys::Mapping;

/// Where the kernel lists its nodes.
const SYSFS: &str = "/sys/devices/system/node";

/// Before the first page of `memory` is taken: says from which node they are to come, if there is more
/// than one. That node's memory is preferred, not insisted on. Whether it works changes how fast
/// things are, and nothing else.
pub(super) fn choose(memory: &Memory) {
    let Some(node) = roomiest(Path::new(SYSFS)) else {
        return;
    };
    let preferred = Mapping::new(memory, true).and_then(|mapping| mapping.prefer(node));
    match preferred {
        Ok(()) => tracing::debug!(len = memory.len(), node, "a region on a NUMA node"),
        Err(error) => tracing::debug!(node, %error, "no NUMA node could be preferred"),
    }
}

/// The node with the most memory free or easily freed; `None` where there is no choice.
fn roomiest(root: &Path) -> Option<u32> {
    let listed = fs::read_to_string(root.join("has_memory")).ok()?;
    let nodes = numbers(&listed);
    if nodes.len() < 2 {
        return None;
    }
    let room = |node: &u32| {
        let info = fs::read_to_string(root.join(format!("node{node}/meminfo"))).unwrap_or_default();
        // What the page cache holds goes as soon as somebody asks; what is shared memory stays.
        let kib = |name: &str| field(&info, name).unwrap_or(0);
        kib("MemFree:") + kib("Active(file):") + kib("Inactive(file):")
    };
    nodes.into_iter().max_by_key(room)
}

/// The numbers of a list like `0-1,4`.
fn numbers(list: &str) -> Vec<u32> {
    let mut all = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            all.extend((first..=last).take(crate::sys::NODES_MAX));
        }
    }
    all
}

/// A line like `Node 0 MemFree:   1234 kB`.
fn field(info: &str, name: &str) -> Option<u64> {
    info.lines().find_map(|line| {
        let (_, value) = line.split_once(name)?;
        value.trim().strip_suffix("kB")?.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::memory::HugePages;

    fn host(nodes: &[(u32, u64, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let list: Vec<_> = nodes.iter().map(|node| node.0.to_string()).collect();
        fs::write(dir.path().join("has_memory"), list.join(",") + "\n").unwrap();
        for (node, free, cached) in nodes {
            let at = dir.path().join(format!("node{node}"));
            fs::create_dir(&at).unwrap();
            let text = format!(
                "Node {node} MemTotal:       16384000 kB\nNode {node} MemFree:        {free} kB\n\
                 Node {node} Active(file):   {cached} kB\nNode {node} Inactive(file):     10 kB\n"
            );
            fs::write(at.join("meminfo"), text).unwrap();
        }
        dir
    }

    #[test]
    fn the_node_with_the_most_room_is_taken() {
        let of = |nodes: &[_]| roomiest(host(nodes).path());
        assert_eq!(of(&[(0, 100, 0), (1, 200, 0)]), Some(1));
        assert_eq!(of(&[(0, 100, 500), (1, 200, 0)]), Some(0));
        assert_eq!(of(&[(0, 1, 0), (2, 2, 0), (7, 3, 0)]), Some(7));
    }

    #[test]
    fn without_a_choice_there_is_none() {
        assert_eq!(roomiest(host(&[(0, 100, 0)]).path()), None);
        assert_eq!(roomiest(Path::new("/nonexistent")), None);
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(numbers("0\n"), [0]);
        assert_eq!(numbers("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(numbers("\n"), [0_u32; 0]);
        assert!(numbers("0-4294967295").len() <= 1024);
    }

    #[test]
    fn a_node_that_is_there_can_be_preferred() {
        let len = crate::REGION_ALIGN_BYTES;
        let memory = Memory::new(len, HugePages::Never, false).unwrap();
        let mapping = Mapping::new(&memory, true).unwrap();
        match mapping.prefer(0) {
            Ok(()) => {}
            // A kernel without NUMA.
            Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::ENOSYS), "{error}"),
        }
        assert!(mapping.prefer(1023).is_err(), "no machine here has so many");
        assert!(mapping.prefer(5000).is_err());
    }
}
