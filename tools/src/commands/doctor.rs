//! `harbour doctor`: what is wrong on this host and what to do about it.

use std::{fs, path::Path, process::ExitCode, time::Duration};

use harbour_metad_client::{tls, v1};
use serde_json::json;

use super::{Context, daemon, status};
use crate::{cli::Listing, failure::Code, output, size::Size};

mod engines;
mod rdma;

/// A certificate that ends sooner than this is spoken of.
const CERTIFICATE_DAYS: i64 = 30;

/// One finding.
struct Finding {
    what: &'static str,
    grade: Grade,
    detail: String,
    next: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Grade {
    Good,
    /// Works, but less well than it could.
    Weak,
    Bad,
}

impl Grade {
    const fn word(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Weak => "weak",
            Self::Bad => "bad",
        }
    }
}

fn finding(
    what: &'static str,
    grade: Grade,
    detail: impl Into<String>,
    next: impl Into<String>,
) -> Finding {
    Finding {
        what,
        grade,
        detail: detail.into(),
        next: next.into(),
    }
}

pub(super) fn run(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let mut findings = vec![
        user(),
        fuse(),
        overlay(),
        erofs(),
        huge_pages(),
        giving_back(),
        locked_memory(),
        open_files(),
    ];
    findings.extend(rdma::host(&context.devices(None)));
    findings.push(state_directory(context));
    findings.extend(certificates(context));
    findings.extend(daemons(context));
    findings.push(mount(context));
    findings.extend(engines::engines(context));
    let bad = findings.iter().any(|f| f.grade == Grade::Bad);
    if args.json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| json!({ "check": f.what, "grade": f.grade.word(), "detail": f.detail, "next": f.next }))
            .collect();
        output::json(&json!(list))?;
    } else {
        let mut text = String::new();
        for f in &findings {
            text += &format!("{:5} {:12} {}\n", f.grade.word(), f.what, f.detail);
            if !f.next.is_empty() && f.grade != Grade::Good {
                text += &format!("{:18} -> {}\n", "", f.next);
            }
        }
        output::say(&output::printable(&text))?;
    }
    Ok(if bad {
        ExitCode::from(Code::Failed as u8)
    } else {
        ExitCode::SUCCESS
    })
}

fn user() -> Finding {
    if nix::unistd::geteuid().is_root() {
        finding("user", Grade::Good, "root", "")
    } else {
        finding(
            "user",
            Grade::Bad,
            "not root: images have owners and devices that only root can show",
            "run as root",
        )
    }
}

fn filesystems() -> String {
    fs::read_to_string("/proc/filesystems").unwrap_or_default()
}

fn known(name: &str) -> bool {
    filesystems()
        .lines()
        .any(|line| line.split_whitespace().last() == Some(name))
}

fn fuse() -> Finding {
    match fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
    {
        Ok(_) => finding("fuse", Grade::Good, "/dev/fuse opens", ""),
        Err(error) => finding(
            "fuse",
            Grade::Bad,
            format!("/dev/fuse: {error}"),
            "modprobe fuse; in a container, pass --device /dev/fuse",
        ),
    }
}

fn overlay() -> Finding {
    if known("overlay") {
        finding("overlayfs", Grade::Good, "the kernel has it", "")
    } else {
        finding(
            "overlayfs",
            Grade::Weak,
            "not loaded: containers need it on top of the mount",
            "modprobe overlay",
        )
    }
}

/// The kernel's release, and its first two numbers.
fn kernel() -> (String, (u32, u32)) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (release, version)
}

fn erofs() -> Finding {
    let (release, version) = kernel();
    match (known("erofs"), version >= (6, 12)) {
        (true, true) => finding(
            "fast view",
            Grade::Good,
            format!("kernel {release} mounts EROFS from files"),
            "",
        ),
        (_, false) => finding(
            "fast view",
            Grade::Weak,
            format!(
                "kernel {release} is older than 6.12: directories are served, the fast view is not"
            ),
            "a newer kernel makes opening many small files several times faster",
        ),
        (false, true) => finding(
            "fast view",
            Grade::Weak,
            "the kernel has EROFS only as a module, or not at all",
            "modprobe erofs",
        ),
    }
}

fn huge_pages() -> Finding {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let number = |key: &str| -> u64 {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    let free = number("HugePages_Free:") * number("Hugepagesize:") * 1024;
    if free > 0 {
        finding(
            "huge pages",
            Grade::Good,
            format!("{} free", Size(free)),
            "",
        )
    } else {
        finding(
            "huge pages",
            Grade::Weak,
            "none are free: a donor uses ordinary pages",
            "sysctl vm.nr_hugepages=N, before the donor starts",
        )
    }
}

/// Freeing ordinary pages takes a quarter of a second for each GiB that readers map, 2 MiB pages a
/// hundredth of that. Donors ask for those as memory is first written, which a kernel can do since
/// Linux 6.1 and an administrator can deny.
fn giving_back() -> Finding {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let text = fs::read_to_string(path).unwrap_or_default();
    let chosen = text.split(['[', ']']).nth(1).unwrap_or("deny");
    let slow =
        "lent memory is in 4 KiB pages: a donor that has to gives it back at 1 to 4 GiB a second";
    if chosen == "deny" {
        let next = if text.is_empty() {
            "a kernel with transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)".to_owned()
        } else {
            format!(
                "echo never > {path}, before the donor starts: donors then ask for what they need"
            )
        };
        return finding(
            "giving back",
            Grade::Weak,
            format!("{slow} ({chosen})"),
            next,
        );
    }
    let on_demand = kernel().1 >= (6, 1);
    if on_demand || matches!(chosen, "always" | "within_size" | "force") {
        finding(
            "giving back",
            Grade::Good,
            "lent memory is in 2 MiB pages as it is written, and goes back in milliseconds",
            "",
        )
    } else {
        finding(
            "giving back",
            Grade::Weak,
            slow,
            format!("Linux 6.1 or later; or echo within_size > {path}, before the donor starts"),
        )
    }
}

/// What a donor may lock with --lock-memory.
fn locked_memory() -> Finding {
    use nix::sys::resource::{Resource, getrlimit};
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().count() < 2 {
        return finding(
            "locking",
            Grade::Good,
            "this host does not swap: lent memory stays in memory without being locked",
            "",
        );
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft == nix::libc::RLIM_INFINITY => finding(
            "locking",
            Grade::Good,
            "a donor may lock its memory (--lock-memory)",
            "",
        ),
        Ok((soft, _)) => finding(
            "locking",
            Grade::Weak,
            format!("this host swaps, and only {} may be locked", Size(soft)),
            "ulimit -l unlimited, and start the donor with --lock-memory",
        ),
        Err(error) => finding(
            "locking",
            Grade::Weak,
            format!("the limit cannot be read: {error}"),
            "",
        ),
    }
}

fn open_files() -> Finding {
    match nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft < 1024 => finding(
            "files",
            Grade::Weak,
            format!("only {soft} open files are allowed"),
            "ulimit -n 65536",
        ),
        Ok((soft, _)) => finding(
            "files",
            Grade::Good,
            format!("{soft} open files are allowed"),
            "",
        ),
        Err(error) => finding(
            "files",
            Grade::Weak,
            format!("the limit cannot be read: {error}"),
            "",
        ),
    }
}

fn state_directory(context: &Context) -> Finding {
    let dir = &context.places.state;
    let existing = dir
        .ancestors()
        .find(|d| d.exists())
        .unwrap_or(Path::new("/"));
    match nix::sys::statvfs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let grade = if free < 256 << 20 {
                Grade::Bad
            } else {
                Grade::Good
            };
            finding(
                "state",
                grade,
                format!("{} free at {}", Size(free), dir.display()),
                "metad keeps indexes there: free some space",
            )
        }
        Err(error) => finding(
            "state",
            Grade::Bad,
            format!("{}: {error}", dir.display()),
            "give another --state-dir",
        ),
    }
}

/// This host's certificates, where it has or needs any.
fn certificates(context: &Context) -> Option<Finding> {
    const WHAT: &str = "certificates";
    let dir = &context.places.tls;
    let needed = context.places.metad.starts_with("https:") || context.places.tls_named;
    if !needed && !dir.join(tls::CERTIFICATE_FILE).exists() {
        return None;
    }
    let ends = tls::Identity::load(dir).and_then(|_| {
        let own = tls::Certificate::read(&dir.join(tls::CERTIFICATE_FILE))?;
        let ca = tls::Certificate::read(&dir.join(tls::CA_FILE))?;
        Ok((own, ca))
    });
    let (own, ca) = match ends {
        Ok(ends) => ends,
        Err(error) => {
            let detail = crate::node::refill::chain(&error);
            return Some(finding(WHAT, Grade::Bad, detail, error.next()));
        }
    };
    let first = if ca.until_unix < own.until_unix {
        &ca
    } else {
        &own
    };
    let days = first.days_left(output::now_unix());
    let detail = format!(
        "{} is good until {} ({days} days)",
        first.subject,
        tls::date(first.until_unix)
    );
    if days < CERTIFICATE_DAYS {
        let next = if first.is_ca {
            "make a new authority (harbour certs init --dir NEW) and give every host a certificate of it"
        } else {
            "where the CA is: harbour certs issue NAME; then copy hosts/NAME here"
        };
        return Some(finding(WHAT, Grade::Weak, detail, next));
    }
    Some(finding(WHAT, Grade::Good, detail, ""))
}

fn daemons(context: &Context) -> Vec<Finding> {
    let asked = context.runtime().and_then(|runtime| {
        runtime.block_on(async {
            let client = context.client().await?.with_timeout(Duration::from_secs(3));
            anyhow::Ok(client.list_donors(v1::ListDonorsRequest {}).await?.donors)
        })
    });
    match asked {
        Err(error) => {
            let detail = crate::node::refill::chain(error.as_ref());
            let up = daemon::holder(context, "metad").is_some();
            let next = if up {
                "it runs but does not answer: see its log"
            } else {
                "start everything on this host: harbour up -d"
            };
            vec![finding("metad", Grade::Bad, detail, next)]
        }
        Ok(donors) => {
            let live = donors.iter().filter(|d| d.live).count();
            let pool = if live == 0 {
                finding(
                    "donors",
                    Grade::Bad,
                    "no donor lends memory: pulls have nowhere to go",
                    "harbour donor --lend 8GiB",
                )
            } else {
                finding(
                    "donors",
                    Grade::Good,
                    format!("{live} of {} live", donors.len()),
                    "",
                )
            };
            let mut findings = vec![
                finding(
                    "metad",
                    Grade::Good,
                    format!("answers at {}", context.places.metad),
                    "",
                ),
                pool,
            ];
            findings.extend(rdma::donors(context, &donors));
            findings
        }
    }
}

fn mount(context: &Context) -> Finding {
    let path = context.places.mount.display();
    let node = status::node_status(context);
    if node["hung"].as_bool() == Some(true) {
        return finding(
            "mount",
            Grade::Bad,
            format!("{path} does not answer"),
            "harbour down --force, then harbour up -d",
        );
    }
    if node["mounted"].as_bool() == Some(false) {
        let stale = fs::symlink_metadata(&context.places.mount)
            .is_err_and(|e| e.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32));
        return if stale {
            finding(
                "mount",
                Grade::Bad,
                format!("{path} is left from a process that has gone"),
                "harbour down, then harbour up -d",
            )
        } else {
            finding(
                "mount",
                Grade::Bad,
                format!("{path} is not mounted"),
                "harbour up -d",
            )
        };
    }
    finding("mount", Grade::Good, format!("{path} serves"), "")
}
