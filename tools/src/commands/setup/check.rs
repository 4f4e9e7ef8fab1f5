//! `harbour setup check`: whether an engine uses us, seen by a real pull.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harbour_image::{digest::Digest, reference::Reference};
use harbour_metad_client::v1;
use serde_json::{Value, json};

use super::{Context, plan};
use crate::{
    cli::setup::Check,
    failure::{self, Code},
    output,
    setup::{Engine, SNAPSHOTTER, ask, ask::Answer},
};

/// How long a pull may take: of an image that is not in the pool too.
const PULL: Duration = Duration::from_secs(300);
/// How long anything else that an engine is asked may take.
const LIMIT: Duration = Duration::from_secs(30);
/// How long an engine that was just restarted may take to answer.
const UP: Duration = Duration::from_secs(30);
/// Where what is pulled to see is kept apart from what containerd has.
const NAMESPACE: &str = "harbour-check";
const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// What was seen, a sentence each.
type Seen = Vec<String>;

/// The image to try with.
struct Sample {
    name: String,
    /// The name of its topmost snapshot, if the pool has the image.
    chain: Option<String>,
    plain_http: bool,
}

pub(super) fn run(context: &Context, args: &Check) -> anyhow::Result<ExitCode> {
    let sample = sample(context, args.image.as_deref())?.ok_or_else(|| {
        failure::failure(
            Code::NotFound,
            "there is no image of a registry in the pool to try with",
            "harbour pull one, or name one",
        )
    })?;
    let seen = check(context, args.engine, Some(&sample), args.address.as_deref())?;
    if args.json {
        output::json(&json!({ "engine": args.engine.name(), "image": sample.name, "seen": seen }))?;
    } else {
        output::say(&output::printable(&lines(&seen)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The same at the end of a setup, where an empty pool is no failure: there is nothing to try with yet.
pub(super) fn after_setup(context: &Context, engine: Engine) -> anyhow::Result<Value> {
    let program = if engine == Engine::Containerd {
        "ctr"
    } else {
        engine.name()
    };
    if ask::find(program).is_none() {
        let seen = format!("not tried: there is no {program} on this host");
        output::say(&lines(std::slice::from_ref(&seen)))?;
        return Ok(json!([seen]));
    }
    let (sample, why) = match sample(context, None) {
        Ok(Some(sample)) => (Some(sample), String::new()),
        Ok(None) => (None, "the pool has no image of a registry".to_owned()),
        Err(error) => (None, format!("{error:#}")),
    };
    let mut seen = check(context, engine, sample.as_ref(), None)?;
    if sample.is_none() {
        seen.push(format!(
            "no pull was tried ({why}); when there is an image: harbour setup check {}",
            engine.name()
        ));
    }
    output::say(&output::printable(&lines(&seen)))?;
    Ok(json!(seen))
}

fn lines(seen: &[String]) -> String {
    seen.iter().map(|line| format!("{line}\n")).collect()
}

fn check(
    context: &Context,
    engine: Engine,
    sample: Option<&Sample>,
    address: Option<&Path>,
) -> anyhow::Result<Seen> {
    if engine != Engine::Podman {
        let socket = plan::socket(&context.places);
        UnixStream::connect(&socket).map_err(|error| {
            failure::failure(
                Code::Unavailable,
                format!(
                    "our snapshotter does not answer at {}: {error}",
                    socket.display()
                ),
                "is the node running? harbour up -d, or systemctl start harbour",
            )
        })?;
    }
    match engine {
        Engine::Containerd => containerd(sample, address.unwrap_or(Path::new(CONTAINERD))),
        Engine::Docker => docker(sample, address),
        Engine::Podman => podman(context, sample),
    }
}

/// The image that was named, or the smallest of the pool that has a registry.
fn sample(context: &Context, named: Option<&str>) -> anyhow::Result<Option<Sample>> {
    let snapshot = context
        .runtime()?
        .block_on(async { anyhow::Ok(context.client().await?.snapshot().await?) });
    let known = snapshot.map(|snapshot| snapshot.images);
    let name_of = |image: &v1::Image| {
        let mark = if image.tag.contains(':') { '@' } else { ':' };
        format!("{}/{}{mark}{}", image.registry, image.repository, image.tag)
    };
    let of_pool = |image: &v1::Image| Sample {
        name: name_of(image),
        chain: chain(&image.diff_ids),
        plain_http: plain_http(context, &image.registry),
    };
    let Some(named) = named else {
        let mut images = known?;
        images.retain(|image| image.source.starts_with("docker://") && image.tag.len() < 128);
        return Ok(images
            .iter()
            .min_by_key(|image| image.unpacked_bytes)
            .map(of_pool));
    };
    let reference: Reference =
        Reference::parse_with_default(named, "docker.io").map_err(|error| {
            failure::failure(
                Code::Usage,
                error.to_string(),
                "name an image as for harbour pull",
            )
        })?;
    let name = reference.name();
    let images = known.unwrap_or_default();
    let found = images
        .iter()
        .find(|image| name_of(image) == name.to_string());
    Ok(Some(found.map_or_else(
        || Sample {
            name: name.to_string(),
            chain: None,
            plain_http: plain_http(context, &name.registry),
        },
        of_pool,
    )))
}

/// The name that engines give the snapshot of all of these layers.
fn chain(diff_ids: &[Vec<u8>]) -> Option<String> {
    let diff_ids: Option<Vec<Digest>> = diff_ids
        .iter()
        .map(|id| Some(Digest::from_bytes(id.as_slice().try_into().ok()?)))
        .collect();
    let chain = |below, id: Digest| Some(id.chained(below));
    Some(diff_ids?.into_iter().fold(None, chain)?.to_string())
}

/// Whether a registry is asked without TLS: one on this host, or one that the configuration names so.
fn plain_http(context: &Context, registry: &str) -> bool {
    let named = context
        .file
        .registry
        .get(registry)
        .is_some_and(|r| r.insecure);
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    named || host == "localhost" || host.starts_with("127.") || host == "[::1]"
}

/// A program of an engine, with the arguments that all of its calls have.
struct Tool {
    program: PathBuf,
    common: Vec<String>,
}

impl Tool {
    fn find(name: &str, common: Vec<String>) -> anyhow::Result<Self> {
        let program = ask::find(name).ok_or_else(|| {
            failure::failure(
                Code::NotFound,
                format!("there is no {name} on this host to try with"),
                format!("install it, or put it into PATH: {name} comes with the engine"),
            )
        })?;
        Ok(Self { program, common })
    }

    fn ask(&self, args: &[&str], limit: Duration) -> anyhow::Result<Answer> {
        let common = self.common.iter().map(String::as_str);
        ask::ask(&self.program, common.chain(args.iter().copied()), limit)
    }

    /// What it says, where it has to say something.
    fn told(&self, args: &[&str], limit: Duration, next: &str) -> anyhow::Result<String> {
        let answer = self.ask(args, limit)?;
        if answer.good {
            return Ok(answer.said);
        }
        let name = self
            .program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        Err(failure::failure(
            Code::Failed,
            format!("{name} {}: {}", args.join(" "), answer.why()),
            next,
        ))
    }

    /// The same of an engine that may be on its way up.
    fn told_soon(&self, args: &[&str], next: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + UP;
        loop {
            match self.told(args, LIMIT, next) {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(200))
                }
                other => return other,
            }
        }
    }
}

fn containerd(sample: Option<&Sample>, address: &Path) -> anyhow::Result<Seen> {
    let address = address.display().to_string();
    let ctr = Tool::find("ctr", vec!["--address".into(), address.clone()])?;
    let up = format!("is containerd running at {address}? --address says where else it is");
    let plugins = ctr.told_soon(&["plugins", "ls"], &up)?;
    let state = plugins.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ours = words.first()?.starts_with("io.containerd.snapshotter")
            && words.get(1) == Some(&SNAPSHOTTER);
        ours.then(|| words.last().copied().unwrap_or_default().to_owned())
    });
    let restart = "harbour setup containerd, then systemctl restart containerd";
    match state.as_deref() {
        Some("ok") => {}
        Some(other) => {
            return Err(failure::failure(
                Code::Failed,
                format!("containerd has the plugin {SNAPSHOTTER}, in state {other}"),
                restart,
            ));
        }
        None => {
            return Err(failure::failure(
                Code::Failed,
                format!("containerd has not loaded the plugin {SNAPSHOTTER}"),
                restart,
            ));
        }
    }
    let mut seen = vec![format!(
        "containerd at {address} has the plugin {SNAPSHOTTER}"
    )];
    let Some(sample) = sample else {
        return Ok(seen);
    };
    let pulled = pull_by_ctr(&ctr, sample);
    // Whatever became of the pull, nothing of it stays.
    let _ = ctr.ask(
        &["-n", NAMESPACE, "images", "rm", "--sync", &sample.name],
        LIMIT,
    );
    let _ = ctr.ask(&["namespaces", "rm", NAMESPACE], LIMIT);
    seen.push(pulled?);
    if let Ok(crictl) = Tool::find("crictl", vec!["-r".into(), format!("unix://{address}")]) {
        seen.push(pull_by_cri(&ctr, &crictl, sample)?);
    }
    Ok(seen)
}

fn pull_by_ctr(ctr: &Tool, sample: &Sample) -> anyhow::Result<String> {
    let mut args = vec![
        "-n",
        NAMESPACE,
        "images",
        "pull",
        "--snapshotter",
        SNAPSHOTTER,
    ];
    if sample.plain_http {
        args.push("--plain-http");
    }
    args.push(&sample.name);
    let started = Instant::now();
    ctr.told(
        &args,
        PULL,
        "what could be wrong: harbour doctor, and containerd's log",
    )?;
    let took = started.elapsed();
    has_snapshot(ctr, NAMESPACE, sample)?;
    Ok(format!(
        "ctr pulled {} with it in {:.2} s",
        sample.name,
        took.as_secs_f64()
    ))
}

fn pull_by_cri(ctr: &Tool, crictl: &Tool, sample: &Sample) -> anyhow::Result<String> {
    let had = crictl.ask(&["inspecti", "-q", &sample.name], LIMIT)?.good;
    let started = Instant::now();
    crictl.told(
        &["pull", &sample.name],
        PULL,
        "what could be wrong: harbour doctor, and containerd's log",
    )?;
    let took = started.elapsed();
    let used = has_snapshot(ctr, "k8s.io", sample);
    if !had {
        let _ = crictl.ask(&["rmi", &sample.name], LIMIT);
    }
    used?;
    Ok(format!(
        "CRI pulled {} with it in {:.2} s",
        sample.name,
        took.as_secs_f64()
    ))
}

/// Whether our snapshotter has the image that was just pulled.
fn has_snapshot(ctr: &Tool, namespace: &str, sample: &Sample) -> anyhow::Result<()> {
    let args = [
        "-n",
        namespace,
        "snapshots",
        "--snapshotter",
        SNAPSHOTTER,
        "ls",
    ];
    let listed = ctr.told(&args, LIMIT, "see its log")?;
    let mut names = listed
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    let there = match &sample.chain {
        Some(chain) => names.any(|name| name == chain),
        None => names.next().is_some(),
    };
    if there {
        return Ok(());
    }
    Err(failure::failure(
        Code::Failed,
        format!("{} was pulled, but not with our snapshotter", sample.name),
        "harbour doctor says which keys are wrong",
    ))
}

fn docker(sample: Option<&Sample>, address: Option<&Path>) -> anyhow::Result<Seen> {
    let common = address.map_or_else(Vec::new, |address| {
        vec!["--host".into(), format!("unix://{}", address.display())]
    });
    let docker = Tool::find("docker", common)?;
    // An info without a daemon is no failure, only empty.
    let version = ["version", "--format", "{{.Server.Version}}"];
    docker.told_soon(
        &version,
        "is dockerd running? --address says where its socket is",
    )?;
    let format = "{{.Driver}} {{range .DriverStatus}}{{index . 1}} {{end}}";
    let info = docker.told(&["info", "--format", format], LIMIT, "see its log")?;
    let driver = info.split_whitespace().next().unwrap_or_default();
    if driver != SNAPSHOTTER {
        return Err(failure::failure(
            Code::Failed,
            format!("dockerd stores images with {driver}, not with {SNAPSHOTTER}"),
            "harbour setup docker, then systemctl restart containerd docker; harbour doctor says more",
        ));
    }
    let mut seen = vec![format!("dockerd stores images with {SNAPSHOTTER}")];
    let Some(sample) = sample else {
        return Ok(seen);
    };
    let had = docker.ask(&["image", "inspect", &sample.name], LIMIT)?.good;
    let started = Instant::now();
    docker.told(
        &["pull", "--quiet", &sample.name],
        PULL,
        "what could be wrong: harbour doctor, and dockerd's log",
    )?;
    let took = started.elapsed();
    if !had {
        let _ = docker.ask(&["image", "rm", &sample.name], LIMIT);
    }
    let took = took.as_secs_f64();
    seen.push(format!(
        "docker pulled {} with it in {took:.2} s",
        sample.name
    ));
    Ok(seen)
}

fn podman(context: &Context, sample: Option<&Sample>) -> anyhow::Result<Seen> {
    let podman = Tool::find("podman", Vec::new())?;
    let store = plan::store(&context.places);
    if !store.is_dir() {
        return Err(failure::failure(
            Code::Unavailable,
            format!("there is no image store at {}", store.display()),
            "is the node running? harbour up -d, or systemctl start harbour",
        ));
    }
    let listed = podman.told(&["images", "--format", "json"], LIMIT, "see podman info")?;
    let listed: Value =
        serde_json::from_str(&listed).context("podman images --format json is no JSON")?;
    let images = listed.as_array().cloned().unwrap_or_default();
    let shown = images
        .iter()
        .filter(|image| image["ReadOnly"] == true)
        .count();
    let mut seen = vec![format!(
        "podman lists {shown} images of stores that it only reads"
    )];
    let Some(sample) = sample else {
        return Ok(seen);
    };
    if sample.chain.is_none() {
        anyhow::bail!("{} is not in the pool: harbour pull it first", sample.name);
    }
    let id = podman.told(
        &["image", "inspect", "--format", "{{.Id}}", &sample.name],
        LIMIT,
        "harbour setup podman; harbour doctor says more",
    )?;
    seen.push(format!(
        "podman has {} as {}, without a pull",
        sample.name,
        id.trim()
    ));
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_those_of_the_image_specification() {
        assert_eq!(chain(&[]), None);
        let one = vec![0x11; 32];
        let first = format!("sha256:{}", "11".repeat(32));
        assert_eq!(chain(std::slice::from_ref(&one)), Some(first.clone()));
        let second = Digest::of(format!("{first} {first}").as_bytes()).to_string();
        assert_eq!(chain(&[one.clone(), one]), Some(second));
    }
}
