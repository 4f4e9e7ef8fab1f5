//! Tars made by GNU tar and by Python's tarfile from a real directory, against that directory.
//!
//! Needs root (owners, devices, `security.*` and `trusted.*` attributes), `tar`, `python3` and a
//! temporary directory with extended attributes and ACLs; without them it fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use std::{
    path::Path,
    process::{Command, Stdio},
};

use harbour_image::decode::Compression;
use support::*;

/// Makes the directory `sys.argv[1]`.
const MAKE: &str = r#"
import os, struct, sys
root = os.fsencode(sys.argv[1])
def at(name): return os.path.join(root, name)
def write(name, data, mode=0o644):
    with open(at(name), 'wb') as f: f.write(data)
    os.chmod(at(name), mode)
def acl(*entries): return struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *e) for e in entries)
NO = 0xffffffff
os.makedirs(at(b'dir/sub'))
write(b'dir/plain', b'some text\n' * 100)
write(b'dir/setuid', b'#!/bin/sh\n', 0o4755)
write(b'empty', b'')
write(b'\xff\xfe not utf-8', b'x')
write(b'new\nline', b'y')
write(('ä' * 120).encode(), b'long and not ascii')
os.makedirs(at(b'deep/' + b'/'.join([b'd' * 90] * 5)))
write(b'deep/' + b'/'.join([b'd' * 90] * 5) + b'/' + b'f' * 200, b'deep')
write(b'exact' + b'n' * 95, b'hundred bytes of name')
write(b'big', bytes((i * i + (i >> 9)) % 251 for i in range(2500000)))
os.symlink(b'dir/plain', at(b'link'))
os.symlink(b'/no/such/' + b't' * 300, at(b'longlink'))
os.link(at(b'dir/plain'), at(b'dir/sub/hard'))
os.link(at(b'dir/plain'), at(b'zhard'))
os.link(at(b'link'), at(b'hardsymlink'))
os.mkfifo(at(b'fifo'), 0o600)
os.mknod(at(b'char'), 0o620 | 0o020000, os.makedev(5, 300))
os.mknod(at(b'block'), 0o660 | 0o060000, os.makedev(259, 7))
os.mkdir(at(b'sticky')); os.chmod(at(b'sticky'), 0o3777)
def sparse(name, size, pieces):
    with open(at(name), 'wb') as f:
        for offset, data in pieces:
            f.seek(offset); f.write(data)
        f.truncate(size)
sparse(b'sparse-hole', 3 << 20, [])
sparse(b'sparse-middle', 5 << 20, [(1 << 20, b'm' * 4096), ((4 << 20) + 8192, b'n' * 70000)])
sparse(b'sparse-many', 4 << 20, [(i * 32768, bytes([i % 255 + 1]) * 4096) for i in range(100)])
sparse(b'sparse-ends', (6 << 20) + 5, [(0, b'a'), ((6 << 20) + 4, b'z')])
def xattr(name, key, value): os.setxattr(at(name), key, value, follow_symlinks=False)
xattr(b'dir/plain', b'user.text', b'value')
xattr(b'dir/plain', b'user.binary', bytes(range(256)))
xattr(b'dir', b'user.on.dir', b'')
xattr(b'dir', b'trusted.thing', b'\x00\x01')
xattr(b'link', b'trusted.link', b'on a symlink')
xattr(b'dir/setuid', b'security.capability', struct.pack('<IIIII', 0x02000001, 1 << 10, 0, 0, 0))
if len(sys.argv) > 2:
    xattr(b'empty', b'system.posix_acl_access', acl((1, 6, NO), (2, 4, 1234), (4, 4, NO), (8, 6, 77), (16, 6, NO), (32, 0, NO)))
    xattr(b'sticky', b'system.posix_acl_default', acl((1, 7, NO), (4, 5, NO), (32, 0, NO)))
number = 0
for folder, dirs, files in os.walk(root, topdown=False):
    for name in sorted(files + dirs):
        path = os.path.join(folder, name)
        number += 1
        os.chown(path, number * 7, 3000000 if number % 5 == 0 else number, follow_symlinks=False)
# chown took the set-id bits.
os.chmod(at(b'dir/setuid'), 0o4755); os.chmod(at(b'sticky'), 0o3777)
xattr(b'dir/setuid', b'security.capability', struct.pack('<IIIII', 0x02000001, 1 << 10, 0, 0, 0))
for folder, dirs, files in os.walk(root, topdown=False):
    for name in sorted(files + dirs):
        number += 1
        time = 1500000000 * 10**9 + number * 1234567891 if number % 7 else -number * 10**9 - 250000000
        os.utime(os.path.join(folder, name), ns=(time, time), follow_symlinks=False)
os.utime(root, ns=(10**18, 10**18))
"#;

/// Prints the lines that `support::lines` would give for the directory.
const WALK: &str = r#"
import hashlib, os, stat, sys
root = os.fsencode(sys.argv[1])
names, first = [b''], {}
for folder, dirs, files in os.walk(root):
    names += [os.path.relpath(os.path.join(folder, n), root) for n in dirs + files]
def esc(b): return ''.join(chr(c) if 33 <= c <= 126 and c != 92 else '\\x%02x' % c for c in b)
for name in sorted(names):
    path = os.path.join(root, name) if name else root
    s = os.lstat(path)
    if stat.S_ISREG(s.st_mode):
        data = open(path, 'rb').read()
        kind = 'f'; more = ' %d %s' % (len(data), hashlib.sha256(data).hexdigest()[:16])
    elif stat.S_ISLNK(s.st_mode): kind = 'l'; more = ' -> ' + esc(os.readlink(path))
    elif stat.S_ISDIR(s.st_mode): kind = 'd'; more = ''
    elif stat.S_ISFIFO(s.st_mode): kind = 'p'; more = ''
    else:
        kind = 'c' if stat.S_ISCHR(s.st_mode) else 'b'
        more = ' %d,%d' % (os.major(s.st_rdev), os.minor(s.st_rdev))
    for key in sorted(map(os.fsencode, os.listxattr(path, follow_symlinks=False))):
        if key != b'security.selinux':
            more += ' ' + esc(key) + '=' + esc(os.getxattr(path, key, follow_symlinks=False))
    if kind != 'd' and s.st_nlink > 1: more += ' #' + esc(first.setdefault(s.st_ino, name))
    print(esc(name) or '.', kind, '%o' % stat.S_IMODE(s.st_mode), '%d:%d' % (s.st_uid, s.st_gid), str(s.st_mtime_ns) + more)
"#;

/// Writes the directory as a tar to standard output with tarfile, in the format given.
const PYTHON_TAR: &str = r#"
import sys, tarfile
with tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=getattr(tarfile, sys.argv[2])) as t:
    t.add(sys.argv[1], arcname='.')
"#;

fn run(command: &mut Command) -> Vec<u8> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .expect("the program is installed");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {errors}");
    output.stdout
}

fn python(script: &str, root: &Path, args: &[&str]) -> Vec<u8> {
    run(Command::new("python3")
        .args(["-c", script])
        .arg(root)
        .args(args))
}

fn walk(root: &Path) -> Vec<String> {
    String::from_utf8(python(WALK, root, &[]))
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn gnu_tar(root: &Path, args: &[&str]) -> Vec<u8> {
    run(Command::new("tar")
        .args(args)
        .args(["--sort=name", "-cf", "-", "-C"])
        .arg(root)
        .arg("."))
}

/// How much of a line a format can say.
#[derive(Clone, Copy)]
struct Says {
    decimals: bool,
    /// Beginnings of the attributes' names.
    attributes: &'static [&'static str],
}

const ALL: Says = Says {
    decimals: true,
    attributes: &["user.", "trusted.", "security.", "system."],
};
const ACLS: Says = Says {
    decimals: true,
    attributes: &["system."],
};
const LITTLE: Says = Says {
    decimals: false,
    attributes: &[],
};

fn reduced(line: &str, says: Says) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    let time: i128 = words[4].parse().unwrap();
    let text = match time {
        _ if says.decimals => time.to_string(),
        // Writers do not agree on how to round what lies before 1970.
        ..0 => "early".to_owned(),
        _ => (time / 1_000_000_000).to_string(),
    };
    words[4] = &text;
    let is_in = |word: &str, spaces: &[&str]| spaces.iter().any(|space| word.starts_with(space));
    words.retain(|word| !is_in(word, ALL.attributes) || is_in(word, says.attributes));
    words.join(" ")
}

#[track_caller]
fn compare(tar: &[u8], want: &[String], says: Says, what: &str) {
    let (decoded, sink) = decode_with(tar, &options(Compression::None)).expect(what);
    let got = lines(&decoded.tree, &sink);
    for (got, want) in got.iter().zip(want) {
        assert_eq!(reduced(got, says), reduced(want, says), "{what}");
    }
    assert_eq!(got.len(), want.len(), "{what}");
}

#[test]
fn gnu_tar_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    std::fs::create_dir(&root).unwrap();
    python(MAKE, &root, &["acl"]);
    let want = walk(&root);
    assert!(want.len() > 30);
    let attributes = ["--format=posix", "--xattrs", "--xattrs-include=*", "--acls"];
    for sparse in [
        &[][..],
        &["--sparse-version=0.0"],
        &["--sparse-version=0.1"],
        &["--sparse-version=1.0"],
    ] {
        let sparse: Vec<&str> = if sparse.is_empty() {
            Vec::new()
        } else {
            [&["--sparse"], sparse].concat()
        };
        let tar = gnu_tar(&root, &[&attributes[..], &sparse].concat());
        compare(&tar, &want, ALL, &format!("posix {sparse:?}"));
    }
    // ACLs as text, whose users and groups have no names here.
    let tar = gnu_tar(&root, &["--format=pax", "--acls", "--sparse"]);
    compare(&tar, &want, ACLS, "pax with ACLs as text");
    let tar = gnu_tar(&root, &["--format=gnu"]);
    compare(&tar, &want, LITTLE, "gnu");
    let tar = gnu_tar(&root, &["--format=gnu", "--sparse"]);
    compare(&tar, &want, LITTLE, "gnu sparse");
    let tar = gnu_tar(&root, &["--format=oldgnu", "--sparse"]);
    compare(&tar, &want, LITTLE, "oldgnu sparse");
}

#[test]
fn python_and_the_small_formats() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    std::fs::create_dir(&root).unwrap();
    python(MAKE, &root, &[]);
    // tarfile writes a symbolic link with two names as two.
    std::fs::remove_file(root.join("hardsymlink")).unwrap();
    let want = walk(&root);
    for format in ["GNU_FORMAT", "PAX_FORMAT"] {
        let tar = python(PYTHON_TAR, &root, &[format]);
        // tarfile keeps decimals as a float: seconds are compared.
        compare(&tar, &want, LITTLE, format);
    }
    // ustar and v7 cannot hold what is long, large or early: such entries are taken away first.
    let long = want.iter().filter_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let gid: u32 = words[3].split(':').nth(1).unwrap().parse().unwrap();
        let too_much = words[0].contains("dddd")
            || words[0].len() > 90
            || words[1] == "l"
            || gid > 0o7777777
            || words[4].starts_with('-')
            || words[0].contains("\\x");
        too_much.then(|| words[0].to_owned())
    });
    for name in long {
        // Names with escapes stand for bytes that no shell word holds; Python takes them away.
        let script = "import os, shutil, sys\n\
            name = sys.argv[2].encode().decode('unicode_escape').encode('latin-1')\n\
            path = os.path.join(os.fsencode(sys.argv[1]), name)\n\
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) \
            else os.path.lexists(path) and os.unlink(path)";
        python(script, &root, &[&name]);
    }
    let want = walk(&root);
    assert!(want.len() >= 10, "{want:#?}");
    for format in ["--format=ustar", "--format=v7"] {
        // v7 knows files, directories and links only.
        let exclude = ["--exclude=./fifo", "--exclude=./char", "--exclude=./block"];
        let want: Vec<String> = want
            .iter()
            .filter(|line| {
                !["fifo ", "char ", "block "]
                    .iter()
                    .any(|name| line.starts_with(name))
            })
            .cloned()
            .collect();
        let tar = gnu_tar(&root, &[&[format][..], &exclude].concat());
        compare(&tar, &want, LITTLE, format);
    }
    let tar = gnu_tar(&root, &["--format=ustar"]);
    compare(&tar, &want, LITTLE, "ustar with devices");
}
