//! The promises that a [`Tree`] makes in its documentation, checked: for tests and fuzzing.

use crate::{
    object::OBJECT_MAX,
    tree::{Content, Dir, Kind, Node, NodeId, ObjectKey, Tree},
};

/// The first promise that `tree` breaks. `object_len` gives the length of an object in bytes, if
/// there is such an object.
pub fn check_tree(
    tree: &Tree,
    object_len: impl Fn(ObjectKey) -> Option<usize>,
) -> Result<(), String> {
    let root = tree.nodes.first().ok_or("there is no root")?;
    if !matches!(root.kind, Kind::Dir(_)) {
        return Err("the root is not a directory".to_owned());
    }
    let mut is_met = vec![false; tree.nodes.len()];
    for (number, node) in tree.nodes.iter().enumerate() {
        check_node(tree, node, &object_len).map_err(|fault| format!("node {number}: {fault}"))?;
    }
    // Walked from the root, each directory may be met once: then there is no cycle either.
    let mut todo = vec![Tree::ROOT];
    while let Some(id) = todo.pop() {
        let Kind::Dir(dir) = &tree.node(id).kind else {
            continue;
        };
        for child in dir.entries.values().filter(|child| is_dir(tree, **child)) {
            if *child == Tree::ROOT || std::mem::replace(&mut is_met[child.0 as usize], true) {
                return Err(format!("directory {} has two names", child.0));
            }
            todo.push(*child);
        }
    }
    Ok(())
}

fn is_dir(tree: &Tree, id: NodeId) -> bool {
    matches!(tree.node(id).kind, Kind::Dir(_))
}

fn check_node(
    tree: &Tree,
    node: &Node,
    object_len: &impl Fn(ObjectKey) -> Option<usize>,
) -> Result<(), String> {
    let meta = &node.meta;
    if meta.mode > 0o7777 || meta.mtime.nanos >= 1_000_000_000 {
        return Err(format!("mode {:o}, {} ns", meta.mode, meta.mtime.nanos));
    }
    for name in meta.xattrs.keys() {
        let is_overlay =
            name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
        if name.is_empty() || name.len() > 255 || name.contains(&0) || is_overlay {
            return Err(format!("attribute {name:?}"));
        }
    }
    match &node.kind {
        Kind::Dir(dir) => check_dir(tree, dir),
        Kind::File(content) => check_content(content, object_len),
        Kind::Symlink(target) if target.is_empty() || target.contains(&0) => {
            Err(format!("target {target:?}"))
        }
        _ => Ok(()),
    }
}

fn check_dir(tree: &Tree, dir: &Dir) -> Result<(), String> {
    for (name, child) in &dir.entries {
        let is_plain = !name.contains(&0) && !name.contains(&b'/');
        if !is_plain || !(1..=255).contains(&name.len()) || matches!(&**name, b"." | b"..") {
            return Err(format!("name {name:?}"));
        }
        if child.0 as usize >= tree.nodes.len() {
            return Err(format!("child {} of {}", child.0, tree.nodes.len()));
        }
    }
    Ok(())
}

fn check_content(
    content: &Content,
    object_len: &impl Fn(ObjectKey) -> Option<usize>,
) -> Result<(), String> {
    let mut end = 0;
    for run in &content.runs {
        let len = run.len as usize;
        if run.offset % 4096 != 0 || run.offset < end || !(1..=OBJECT_MAX).contains(&len) {
            return Err(format!("{run:?} after byte {end}"));
        }
        let object_max = OBJECT_MAX as u64;
        if run.offset / object_max != (run.offset + u64::from(run.len) - 1) / object_max {
            return Err(format!("{run:?} goes across a multiple of {OBJECT_MAX}"));
        }
        if object_len(run.object) != Some(len) {
            return Err(format!(
                "{run:?}, object of {:?} bytes",
                object_len(run.object)
            ));
        }
        end = run.offset + u64::from(run.len);
    }
    if end > content.size {
        return Err(format!("content ends at {end}, file at {}", content.size));
    }
    Ok(())
}
