//! A registry on a host.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, Result};

use super::Hosts;
use crate::shell;

/// Port of a registry.
const PORT: u16 = 5000;
/// Until the registry has the image.
const PUSH_LIMIT: Duration = Duration::from_secs(60);

impl Hosts {
    /// Address of the registry of a host, whether it runs or not.
    pub fn registry(&self, host: usize) -> String {
        std::net::SocketAddr::from((self.address(host), PORT)).to_string()
    }

    /// Starts `docker-registry` on a host and pushes an image into it, like `oci:DIR:TAG`, under a
    /// name like `library/debian:12`.
    pub fn serve_image(&self, host: usize, image: &str, name: &str) -> Result<()> {
        let address = self.registry(host);
        let config = self.dir().join("registry.yml");
        let data = self.dir().join("registry");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n\
                 http: {{addr: {address}}}\n",
                data.display()
            ),
        )?;
        let log = std::fs::File::create(self.dir().join("registry.log"))?;
        // Ends with the namespaces, not with this handle.
        let _child = self
            .on(host, "docker-registry")
            .arg("serve")
            .arg(&config)
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.push_image(host, image, name)
    }

    /// Pushes another image into the registry of a host.
    pub fn push_image(&self, host: usize, image: &str, name: &str) -> Result<()> {
        let address = self.registry(host);
        let mut last = String::new();
        let pushed = shell::until("the registry has the image", PUSH_LIMIT, || {
            let mut command = self.on(host, "skopeo");
            command.args(["copy", "-q", "--dest-tls-verify=false", image]);
            command.arg(format!("docker://{address}/{name}"));
            let output = shell::run(&mut command, PUSH_LIMIT)?;
            last.clone_from(&output.stderr);
            Ok(output.status.success().then_some(()))
        });
        pushed.with_context(|| last)
    }
}
