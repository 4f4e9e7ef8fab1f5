//! A Docker, a pool, a registry, and what is asked of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use harbour_tests::{
    cluster::Cluster,
    engines::{
        Dockerd, Row, Site, Suite,
        docker::{Settings, Store},
    },
    shell::{self, Output},
};
use serde_json::Value;

/// One call of `harbour docker`, a restart of the daemon included.
pub(super) const HARBOUR_LIMIT: Duration = Duration::from_secs(120);

/// A Docker, a pool, and a registry that both know.
pub(super) struct Scene {
    pub(super) docker: Dockerd,
    pub(super) cluster: Cluster,
    pub(super) site: Site,
}

impl Scene {
    pub(super) fn start(suite: Suite, row: &mut Row) -> Result<Self> {
        Self::start_with(suite, Store::Overlay2, row)
    }

    pub(super) fn start_with(suite: Suite, store: Store, row: &mut Row) -> Result<Self> {
        let packages = suite.packages()?;
        row.version(packages.version("docker.io"));
        let site = Site::start()?;
        let host = site.registry.host();
        let toml = format!("[node]\nfast_view = \"off\"\n[registry.\"{host}\"]\ninsecure = true\n");
        let cluster = Cluster::configured("128MiB", &toml)?;
        let docker = Dockerd::start(&Settings {
            packages: &packages,
            net: &site.net,
            dir: &site.dir().join("d"),
            registry: &site.registry.host(),
            store,
        })?;
        Ok(Self {
            docker,
            cluster,
            site,
        })
    }

    /// Where this Docker is, as flags.
    fn flags(&self) -> [String; 4] {
        [
            "--daemon-json".into(),
            self.docker.config().display().to_string(),
            "--docker-host".into(),
            format!("unix://{}", self.docker.socket().display()),
        ]
    }

    pub(super) fn command(&self, words: &[&str]) -> std::process::Command {
        let mut command = self.cluster.command(["docker"]);
        command.args(words).args(self.flags());
        command
    }

    /// `harbour docker`, whatever comes of it.
    pub(super) fn try_harbour(&self, words: &[&str]) -> Result<Output> {
        shell::run(&mut self.command(words), HARBOUR_LIMIT)
    }

    /// `harbour docker`, which has to succeed, for what it prints.
    pub(super) fn harbour(&self, words: &[&str]) -> Result<String> {
        Ok(self.try_harbour(words)?.ok()?.text().trim().to_owned())
    }

    /// How far an image is, by `harbour docker list`.
    pub(super) fn state(&self, image: &str) -> Result<Option<String>> {
        let list: Value = serde_json::from_str(&self.harbour(&["list", "--json"])?)?;
        let images = list["images"].as_array().context("no list")?;
        let found = images.iter().find(|found| found["names"][0] == image);
        Ok(found
            .and_then(|found| found["state"].as_str())
            .map(str::to_owned))
    }

    /// Images and layers in the data-root, file by file.
    pub(super) fn store(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let root = self.docker.data_root();
        let mut files = BTreeMap::new();
        for part in ["image", "overlay2", "harbour"] {
            read_all(&root.join(part), &mut files)?;
        }
        // What it has learned of blobs a Docker never forgets.
        files.retain(|path, _| {
            !path
                .components()
                .any(|part| part.as_os_str() == "distribution")
        });
        Ok(files)
    }

    /// Bytes of an image, as this Docker counts them.
    pub(super) fn size(&self, image: &str) -> Result<String> {
        self.docker
            .docker(&["image", "inspect", "--format", "{{.Size}}", image])
    }
}

fn read_all(dir: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?;
        if kind.is_symlink() {
            let target = fs::read_link(&path)?.into_os_string().into_encoded_bytes();
            files.insert(path, target);
        } else if kind.is_dir() {
            read_all(&path, files)?;
        } else if kind.is_file() {
            files.insert(path.clone(), fs::read(path)?);
        }
    }
    Ok(())
}
