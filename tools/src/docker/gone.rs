//! Taking away what is ours and not wanted any more, unless something of Docker's needs it.

use std::collections::{BTreeMap, BTreeSet};

use harbour_image::{
    digest::Digest,
    manifest::{CONFIG_MAX, ImageConfig},
};
use serde::Deserialize;

use super::{
    files::{self, Scratch},
    record::{Record, chains},
    repositories::Repositories,
    root::DataRoot,
};

/// Largest description of a container.
const CONTAINER_MAX: u64 = 16 << 20;

/// What Docker notes of a container, as far as it matters here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    #[serde(default)]
    image: String,
    #[serde(default)]
    name: String,
}

impl DataRoot {
    /// The containers of each image, by its ID.
    pub(super) fn containers(&self) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
        let dir = self.path().join("containers");
        let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in files::names(&dir)? {
            let file = dir.join(&name).join("config.v2.json");
            let Some(bytes) = files::read(&file, CONTAINER_MAX)? else {
                continue;
            };
            // One that Docker cannot read either is none of its containers.
            let Ok(container) = serde_json::from_slice::<Container>(&bytes) else {
                continue;
            };
            let short = name.chars().take(12).collect::<String>();
            let name = container.name.trim_start_matches('/').to_owned();
            let name = if name.is_empty() { short } else { name };
            all.entry(container.image).or_default().push(name);
        }
        Ok(all)
    }

    /// Takes away images of ours that nobody wants, names or uses, then layers that nobody needs, then
    /// what was noted of them. Gives why what stays does.
    pub(super) fn remove_unwanted(
        &self,
        scratch: &Scratch,
        records: &[Record],
        names: &Repositories,
        step: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<String>> {
        let wanted: BTreeSet<Digest> = records
            .iter()
            .filter(|record| record.is_wanted())
            .map(Record::id)
            .collect();
        let (containers, parents) = (self.containers()?, self.parents()?);
        let mut kept = Vec::new();
        for id in self.marked()? {
            if wanted.contains(&id) {
                continue;
            }
            if self.content(&id).exists() {
                let text = id.to_string();
                let named = names.names_of(&text);
                let why = match (named.first(), containers.get(&text), parents.get(&id)) {
                    (Some(name), _, _) => Some(format!("it is {name} too")),
                    (_, Some(users), _) => Some(format!("container {} has it", users.join(", "))),
                    (_, _, Some(child)) => Some(format!("image {} is built on it", child.short())),
                    _ => None,
                };
                if let Some(why) = why {
                    // Nobody asks after one that was kept before.
                    if records.iter().any(|record| record.id() == id) {
                        kept.push(format!("image {} stays in Docker: {why}", id.short()));
                    }
                    continue;
                }
                scratch.remove(&self.content(&id))?;
                step()?;
            }
            scratch.remove(&self.metadata(&id))?;
            step()?;
        }
        let going = self.unneeded(records)?;
        for chain in going {
            self.remove_layer(scratch, &chain)?;
            step()?;
        }
        let mut left = BTreeSet::new();
        for chain in self.all_layers()? {
            if self.is_our_layer(&chain)? {
                left.extend(self.layer_facts(&chain)?.0);
            }
        }
        for record in records.iter().filter(|record| record.is_wanted()) {
            left.extend(record.diff_ids()?);
        }
        self.remove_maps(scratch, &left)?;
        self.remove_tar_splits(scratch, records)?;
        Ok(kept)
    }

    /// Images that are there because of us.
    fn marked(&self) -> anyhow::Result<Vec<Digest>> {
        let dir = self.images().join("imagedb/metadata/sha256");
        let ids = files::names(&dir)?;
        let parse = |name: &String| format!("sha256:{name}").parse::<Digest>().ok();
        let ids = ids.iter().filter_map(parse);
        Ok(ids.filter(|id| self.mark(id).exists()).collect())
    }

    /// For each image that another one was built on, one of those.
    fn parents(&self) -> anyhow::Result<BTreeMap<Digest, Digest>> {
        let dir = self.images().join("imagedb/metadata/sha256");
        let mut parents = BTreeMap::new();
        for name in files::names(&dir)? {
            let text = files::read(&dir.join(&name).join("parent"), 4096)?;
            let text = String::from_utf8(text.unwrap_or_default()).unwrap_or_default();
            let child = format!("sha256:{name}").parse::<Digest>();
            if let (Ok(parent), Ok(child)) = (text.trim().parse::<Digest>(), child) {
                parents.insert(parent, child);
            }
        }
        Ok(parents)
    }

    /// Layers of ours that nothing needs, the highest of each chain first.
    fn unneeded(&self, records: &[Record]) -> anyhow::Result<Vec<Digest>> {
        let mut needed = self.below_containers()?;
        for record in records.iter().filter(|record| record.is_wanted()) {
            needed.extend(chains(&record.diff_ids()?));
        }
        let contents = self.images().join("imagedb/content/sha256");
        for name in files::names(&contents)? {
            let bytes = files::read(&contents.join(&name), CONFIG_MAX)?.unwrap_or_default();
            // One that cannot be read needs nothing that Docker could find.
            if let Ok(config) = ImageConfig::parse(&bytes) {
                needed.extend(chains(&config.diff_ids));
            }
        }
        let mut ours = BTreeSet::new();
        let mut parents = BTreeMap::new();
        for chain in self.all_layers()? {
            parents.extend(self.layer_facts(&chain)?.1.map(|parent| (chain, parent)));
            match self.is_our_layer(&chain)? {
                true => ours.insert(chain),
                false => needed.insert(chain),
            };
        }
        let dirs = self.driver_dirs()?;
        ours.extend(dirs.iter().filter_map(|dir| dir.chain));
        let by_name: BTreeMap<String, Digest> = dirs
            .iter()
            .filter_map(|dir| Some((dir.short_name(), dir.chain?)))
            .collect();
        // Whatever stays needs what is below it: as parent in the database, as directory of the driver.
        loop {
            let before = needed.len();
            let below: Vec<Digest> = needed
                .iter()
                .filter_map(|c| parents.get(c).copied())
                .collect();
            needed.extend(below);
            for dir in &dirs {
                if dir.chain.is_none_or(|chain| needed.contains(&chain)) {
                    needed.extend(dir.lower.iter().filter_map(|name| by_name.get(name)));
                }
            }
            if needed.len() == before {
                break;
            }
        }
        let mut going: Vec<Digest> = ours.difference(&needed).copied().collect();
        let height = |chain: &Digest| {
            std::iter::successors(parents.get(chain), |below| parents.get(*below)).count()
        };
        going.sort_by_key(|chain| std::cmp::Reverse(height(chain)));
        Ok(going)
    }

    fn remove_tar_splits(&self, scratch: &Scratch, records: &[Record]) -> anyhow::Result<()> {
        let mut wanted = BTreeSet::new();
        for record in records.iter().filter(|record| record.is_wanted()) {
            wanted.extend(record.diff_ids()?.iter().map(|id| self.tar_split(id)));
        }
        let dir = self.own().join("tar-split");
        for name in files::names(&dir)? {
            if !wanted.contains(&dir.join(&name)) {
                scratch.remove(&dir.join(&name))?;
            }
        }
        Ok(())
    }
}
