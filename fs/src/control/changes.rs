//! What the kernel must drop when the catalogue has changed.

use std::collections::HashSet;

use super::{Child, Control};
use crate::inode::Node;

/// Names and nodes whose cached state is not true any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Names that are gone or mean something else, by directory.
    pub entries: Vec<(Node, String)>,
    /// Nodes whose attributes, listing or content changed.
    pub nodes: Vec<Node>,
}

impl Changes {
    /// Whether nothing is to be dropped.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.nodes.is_empty()
    }

    /// Adds what came after.
    pub(crate) fn extend(&mut self, later: Self) {
        let mut entries: HashSet<(Node, String)> = self.entries.drain(..).collect();
        entries.extend(later.entries);
        self.entries.extend(entries);
        let mut nodes: HashSet<Node> = self.nodes.drain(..).collect();
        nodes.extend(later.nodes);
        self.nodes.extend(nodes);
    }

    /// From one state to the next.
    pub(crate) fn between(before: &Control, after: &Control) -> Self {
        let mut changes = Self::default();
        for (number, old) in &before.nodes {
            let node = Node::control(*number);
            let new = after.nodes.get(number);
            let (Some(old_children), new_children) =
                (old.children(), new.and_then(|new| new.children()))
            else {
                // Gone ones are dropped with their name.
                if new.is_some_and(|new| new.kind != old.kind) {
                    changes.nodes.push(node);
                }
                continue;
            };
            let gone = |child: &&Child| {
                let now = new.and_then(|new| new.child(child.name.as_bytes()));
                now.is_none_or(|now| now.target != child.target)
            };
            changes.entries.extend(
                old_children
                    .iter()
                    .filter(gone)
                    .map(|child| (node, child.name.to_string())),
            );
            if new_children.is_some_and(|new| new != old_children) {
                changes.nodes.push(node);
            }
        }
        for (number, old) in &before.made {
            if after
                .made
                .get(number)
                .is_some_and(|new| new.print != old.print)
            {
                let all = before.store.members(*number, old.item);
                let members = all.iter().filter_map(|child| child.target.node());
                changes.nodes.push(Node::control(*number));
                changes.nodes.extend(members);
            }
        }
        changes
    }
}
