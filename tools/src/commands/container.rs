//! `harbour run`, `bundle`, `mount`, `umount`

use std::{
    fs,
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use nix::{sys::signal::Signal, unistd::Pid};
use oci_spec::runtime::Spec;
use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use crate::{
    cli::container::{Bundle, Mount, Run, Umount},
    container::{
        home::{self, Home, Runner},
        image::Image,
        overlay::{self, Upper},
        rootless,
        spec::{Wanted, spec},
        user,
    },
    failure::{self, Code},
};

/// Runtimes that are looked for, the first first.
const RUNTIMES: [&str; 2] = ["runc", "crun"];

pub(super) fn run(context: &Context, args: Run) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        return Err(rootless::enter());
    }
    let runner = Runner {
        runtime: runtime(args.runtime)?,
        root: match rootless::inside() {
            true => context.places.state.join("runtime"),
            false => context.places.run.join("containers"),
        },
    };
    let image = Image::find(&context.places, &args.image)?;
    let name = args.name.unwrap_or_else(home::random_name);
    let home = Home::of_container(&context.places.state, &name, &runner)?;
    let rootfs = home.rootfs();
    let outcome = (|| {
        overlay::mount(&image.lower, Some(&home.upper()), &rootfs)?;
        let user = args.wish.user.clone();
        let wanted = args.wish.wanted(name.clone());
        let spec = configure(&image, user.as_deref(), &wanted, home.dir(), &rootfs)?;
        let missing = match rootless::inside() {
            true => rootless::missing(&spec, &rootfs),
            false => Vec::new(),
        };
        if !missing.is_empty() {
            // What lies above may change while nothing is mounted on it.
            overlay::unmount(&rootfs, false)?;
            rootless::make(&missing, &home.upper().upper)?;
            overlay::mount(&image.lower, Some(&home.upper()), &rootfs)?;
        }
        fs::create_dir_all(&runner.root)
            .with_context(|| format!("cannot create {}", runner.root.display()))?;
        supervise(&runner, &home, &name)
    })();
    let removed = home.remove();
    let code = outcome?;
    removed?;
    Ok(code)
}

pub(super) fn bundle(context: &Context, args: Bundle) -> anyhow::Result<ExitCode> {
    root_only("bundle")?;
    let image = Image::find(&context.places, &args.image)?;
    let dir = absolute(&args.dir)?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut entries = fs::read_dir(&dir)?;
    anyhow::ensure!(entries.next().is_none(), "{} is not empty", dir.display());
    let upper = Upper {
        upper: dir.join("upper"),
        work: dir.join("work"),
    };
    let rootfs = dir.join("rootfs");
    for new in [&upper.upper, &upper.work, &rootfs] {
        fs::create_dir(new).with_context(|| format!("cannot create {}", new.display()))?;
    }
    overlay::mount(&image.lower, Some(&upper), &rootfs)?;
    let user = args.wish.user.clone();
    let hostname = dir.file_name().unwrap_or_default().to_string_lossy();
    let wanted = args.wish.wanted(hostname.into_owned());
    if let Err(error) = configure(&image, user.as_deref(), &wanted, &dir, &rootfs) {
        overlay::unmount(&rootfs, true)?;
        return Err(error);
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn mount(context: &Context, args: &Mount) -> anyhow::Result<ExitCode> {
    root_only("mount")?;
    let image = Image::find(&context.places, &args.image)?;
    let target = fs::canonicalize(&args.dir)
        .with_context(|| format!("cannot mount on {}", args.dir.display()))?;
    if args.read_only {
        overlay::mount(&image.lower, None, &target)?;
    } else if let Some(upper) = &args.upper {
        let upper = absolute(upper)?;
        let mut work = upper.clone().into_os_string();
        work.push(".work");
        let upper = Upper {
            upper,
            work: work.into(),
        };
        for dir in [&upper.upper, &upper.work] {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        overlay::mount(&image.lower, Some(&upper), &target)?;
    } else {
        let home = Home::of_mount(&context.places.state, &target)?;
        if let Err(error) = overlay::mount(&image.lower, Some(&home.upper()), &target) {
            home.remove()?;
            return Err(error);
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn umount(context: &Context, args: &Umount) -> anyhow::Result<ExitCode> {
    root_only("umount")?;
    for dir in &args.dirs {
        let target = absolute(dir)?;
        let target = fs::canonicalize(&target).unwrap_or(target);
        let home = Home::of_mounted(&context.places.state, &target);
        match overlay::unmount(&target, args.lazy) {
            Ok(()) => {}
            // Somebody else unmounted it; what was written is still to go.
            Err(error) if home.is_some() && error.kind() == std::io::ErrorKind::InvalidInput => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot unmount {}", target.display()));
            }
        }
        if let Some(home) = home {
            home.remove()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes `dir/config.json` for what is mounted on `rootfs`, and gives it.
fn configure(
    image: &Image,
    user: Option<&str>,
    wanted: &Wanted,
    dir: &Path,
    rootfs: &Path,
) -> anyhow::Result<Spec> {
    let config = &image.config.run;
    let user = user::look_up(rootfs, user.unwrap_or(&config.user))
        .with_context(|| format!("no user for {}", image.name))?;
    if !rootless::exists(user.uid) {
        return Err(failure::failure(
            Code::Failed,
            format!(
                "user {} of {} does not exist in this user namespace",
                user.uid, image.name
            ),
            "run it as another with --user 0, or get a range of IDs in /etc/subuid (package uidmap)",
        ));
    }
    let spec = spec(config, &user, wanted)?;
    let path = dir.join("config.json");
    let mut text = serde_json::to_vec_pretty(&spec)?;
    text.push(b'\n');
    let mut file =
        fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(&text)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(spec)
}

/// Runs the container to its end. Ctrl-C reaches it by the terminal; other signals are passed on.
fn supervise(runner: &Runner, home: &Home, name: &str) -> anyhow::Result<ExitCode> {
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let status = tokio.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut run = tokio::process::Command::from(runner.command());
        run.args(["run", "--bundle"]).arg(home.dir()).arg(name);
        let mut child = run
            .spawn()
            .with_context(|| format!("cannot run {}", runner.runtime.display()))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pass = |signal: Signal| {
            if let Some(pid) = pid
                && let Err(error) = nix::sys::signal::kill(Pid::from_raw(pid), signal)
            {
                tracing::warn!(%error, "a signal could not be passed on");
            }
        };
        loop {
            tokio::select! {
                status = child.wait() => return anyhow::Ok(status?),
                _ = interrupt.recv() => {}
                _ = terminate.recv() => pass(Signal::SIGTERM),
                _ = hangup.recv() => pass(Signal::SIGHUP),
            }
        }
    })?;
    // 128 and the signal's number, as a shell has it, when the runtime itself was killed.
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(ExitCode::from(
        code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
    ))
}

/// The runtime that was asked for, or the first that is installed.
fn runtime(asked: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from))
        .collect();
    let find = |name: &Path| {
        let here = name.components().count() > 1;
        let candidates = dirs.iter().map(|dir| dir.join(name));
        match here {
            true => Some(name.to_owned()).filter(|file| file.is_file()),
            false => candidates.into_iter().find(|file| file.is_file()),
        }
    };
    let found = match &asked {
        Some(asked) => find(asked),
        None => RUNTIMES.iter().find_map(|name| find(Path::new(name))),
    };
    found.ok_or_else(|| {
        let what = asked.map_or_else(
            || "there is no OCI runtime on this host".to_owned(),
            |asked| format!("there is no runtime {}", asked.display()),
        );
        failure::failure(
            Code::NotFound,
            what,
            "install one: apt install runc (or crun)",
        )
    })
}

fn root_only(command: &str) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(failure::failure(
        Code::Failed,
        format!("harbour {command} mounts an overlay, for which it has to be root"),
        "run it with sudo, or inside a user namespace: unshare --user --map-root-user --mount",
    ))
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))
}
