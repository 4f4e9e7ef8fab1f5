//! A client of the container runtime interface, which is how Kubernetes drives containerd.

use std::{future::Future, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint},
};

use crate::shell;

/// Messages and clients, generated from `tests/proto/cri.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::{image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient};

/// One call, pulls included.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// Until the service behind the socket is up: it is a plugin that starts after the socket.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Until a container has run to its end.
const END_LIMIT: Duration = Duration::from_secs(30);
/// Most that a list of images may hold.
const FRAME_MAX: usize = 16 << 20;

/// A connected client; every call blocks, with a deadline.
#[derive(Debug)]
pub struct Cri {
    tokio: Runtime,
    images: ImageServiceClient<Channel>,
    runtime: RuntimeServiceClient<Channel>,
}

impl Cri {
    /// Connects to a socket, and waits until the service there answers.
    pub fn connect(socket: &Path) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = {
            // The channel's own task is started where it is made.
            let _inside = tokio.enter();
            Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector)
        };
        let cri = Self {
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(FRAME_MAX),
            runtime: RuntimeServiceClient::new(channel),
            tokio,
        };
        cri.wait()?;
        Ok(cri)
    }

    /// Waits until the service answers, also after a restart of the engine.
    pub fn wait(&self) -> Result<()> {
        shell::until("the runtime interface answers", READY_LIMIT, || {
            let answers = self.version().is_ok() && self.images().is_ok();
            Ok(answers.then_some(()))
        })
    }

    fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        let limited = async { tokio::time::timeout(CALL_LIMIT, call).await };
        match self.tokio.block_on(limited) {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => bail!("{what}: {:?}: {}", status.code(), status.message()),
            Err(_) => bail!("{what}: no answer within {CALL_LIMIT:?}"),
        }
    }

    /// Name and version of the engine.
    pub fn version(&self) -> Result<v1::VersionResponse> {
        let mut client = self.runtime.clone();
        let request = Request::new(v1::VersionRequest::default());
        self.call("Version", client.version(request))
    }

    /// Pulls; gives the ID of the image.
    pub fn pull(&self, image: &str) -> Result<String> {
        let mut client = self.images.clone();
        let image = Some(spec(image));
        let request = Request::new(v1::PullImageRequest { image });
        let answer = self.call("PullImage", client.pull_image(request))?;
        Ok(answer.image_ref)
    }

    /// All images.
    pub fn images(&self) -> Result<Vec<v1::Image>> {
        let mut client = self.images.clone();
        let request = Request::new(v1::ListImagesRequest {});
        Ok(self.call("ListImages", client.list_images(request))?.images)
    }

    /// One image, if it is there.
    pub fn image(&self, image: &str) -> Result<Option<v1::Image>> {
        let mut client = self.images.clone();
        let image = Some(spec(image));
        let request = Request::new(v1::ImageStatusRequest { image });
        Ok(self
            .call("ImageStatus", client.image_status(request))?
            .image)
    }

    /// Removes an image.
    pub fn remove(&self, image: &str) -> Result<()> {
        let mut client = self.images.clone();
        let image = Some(spec(image));
        let request = Request::new(v1::RemoveImageRequest { image });
        self.call("RemoveImage", client.remove_image(request))?;
        Ok(())
    }

    /// What images take, by the engine's own count.
    pub fn image_bytes(&self) -> Result<u64> {
        let mut client = self.images.clone();
        let request = Request::new(v1::ImageFsInfoRequest {});
        let answer = self.call("ImageFsInfo", client.image_fs_info(request))?;
        let used = answer.image_filesystems.iter();
        Ok(used
            .filter_map(|usage| usage.used_bytes.as_ref())
            .map(|bytes| bytes.value)
            .sum())
    }

    /// Starts a pod with a container of `image` in it; `args` stand in for the image's command
    /// unless they are empty. What it prints goes below `logs`.
    pub fn start(&self, image: &str, name: &str, args: &[&str], logs: &Path) -> Result<Pod<'_>> {
        let config = sandbox(name, logs);
        let request = Request::new(v1::RunPodSandboxRequest {
            config: Some(config.clone()),
        });
        let mut client = self.runtime.clone();
        let answer = self.call("RunPodSandbox", client.run_pod_sandbox(request))?;
        // From here on it is taken away whatever happens.
        let mut pod = Pod {
            cri: self,
            sandbox: answer.pod_sandbox_id,
            container: String::new(),
            log: logs.join(format!("{name}.log")),
        };
        let linux = v1::LinuxContainerSecurityContext {
            namespace_options: Some(on_the_node()),
        };
        let container = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(spec(image)),
            args: args.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(linux),
            }),
            ..Default::default()
        };
        let request = Request::new(v1::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        });
        let answer = self.call("CreateContainer", client.create_container(request))?;
        pod.container = answer.container_id;
        let request = Request::new(v1::StartContainerRequest {
            container_id: pod.container.clone(),
        });
        self.call("StartContainer", client.start_container(request))?;
        Ok(pod)
    }
}

/// A pod with one container; stopped and removed when dropped.
#[derive(Debug)]
pub struct Pod<'a> {
    cri: &'a Cri,
    sandbox: String,
    container: String,
    log: std::path::PathBuf,
}

impl Pod<'_> {
    /// Waits until the container has ended, for what it printed on its standard output.
    pub fn said(&self) -> Result<String> {
        let ended = shell::until("the container ends", END_LIMIT, || {
            let status = self.status()?;
            let ended = status.state == v1::ContainerState::ContainerExited as i32;
            Ok(ended.then_some(status))
        })?;
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        ensure!(
            ended.exit_code == 0,
            "the container ended with {} ({} {})\n{log}",
            ended.exit_code,
            ended.reason,
            ended.message
        );
        // Each line is: time, stream, whether it is whole, text.
        let lines = log.lines().filter_map(|line| {
            let mut words = line.splitn(4, ' ');
            let stream = words.nth(1)?;
            (stream == "stdout").then(|| words.nth(1).unwrap_or_default())
        });
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    /// How the container is.
    pub fn status(&self) -> Result<v1::ContainerStatus> {
        let request = Request::new(v1::ContainerStatusRequest {
            container_id: self.container.clone(),
        });
        let mut client = self.cri.runtime.clone();
        let answer = self
            .cri
            .call("ContainerStatus", client.container_status(request))?;
        answer.status.context("ContainerStatus without a status")
    }

    /// What a command in the container prints; it has to succeed.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        let request = Request::new(v1::ExecSyncRequest {
            container_id: self.container.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: i64::try_from(END_LIMIT.as_secs())?,
        });
        let mut client = self.cri.runtime.clone();
        let answer = self.cri.call("ExecSync", client.exec_sync(request))?;
        let (out, err) = (&answer.stdout, &answer.stderr);
        ensure!(
            answer.exit_code == 0,
            "{command:?} ended with {}\n{}{}",
            answer.exit_code,
            String::from_utf8_lossy(out),
            String::from_utf8_lossy(err)
        );
        Ok(String::from_utf8_lossy(out).trim().to_owned())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let mut client = self.cri.runtime.clone();
        let pod_sandbox_id = self.sandbox.clone();
        let request = Request::new(v1::StopPodSandboxRequest { pod_sandbox_id });
        let stopped = self
            .cri
            .call("StopPodSandbox", client.stop_pod_sandbox(request));
        let pod_sandbox_id = self.sandbox.clone();
        let request = Request::new(v1::RemovePodSandboxRequest { pod_sandbox_id });
        let removed = self
            .cri
            .call("RemovePodSandbox", client.remove_pod_sandbox(request));
        for error in [stopped.err(), removed.err()].into_iter().flatten() {
            eprintln!("taking a pod away: {error:#}");
        }
    }
}

fn spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec {
        image: image.to_owned(),
    }
}

/// The engine's own network, as there are no network plugins here.
fn on_the_node() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Container as i32,
        ipc: v1::NamespaceMode::Pod as i32,
    }
}

fn sandbox(name: &str, logs: &Path) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        log_directory: logs.display().to_string(),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(on_the_node()),
            }),
        }),
    }
}
