//! Promises about what a connection may do, and about its end.

use std::{
    thread,
    time::{Duration, Instant},
};

use harbour_pool::transport::{Access, Transport, TransportError, TransportKind};

use super::{Subject, read, reader, soon, write, writer};

pub fn read_only(subject: &dyn Subject, _: TransportKind) {
    let reader = reader(subject);
    let error = write(&*reader, 0, 0, &[1]).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    assert_eq!(read(&*reader, 0, 0, 1).unwrap(), [0]);
}

pub fn wrong_epoch(subject: &dyn Subject, _: TransportKind) {
    let actual = reader(subject).epoch();
    let wanted = actual ^ 1 << 40;
    match subject.connect(wanted, Access::Read) {
        Err(TransportError::WrongEpoch {
            wanted: w,
            actual: a,
        }) => assert_eq!((w, a), (wanted, actual)),
        other => panic!("{other:?}"),
    }
}

pub fn any_epoch(subject: &dyn Subject, _: TransportKind) {
    let any = reader(subject);
    let named = subject.connect(any.epoch(), Access::Read).unwrap();
    assert_eq!(any.epoch(), named.epoch());
}

pub fn epoch_change(subject: &dyn Subject, _: TransportKind) {
    let (writer, reader) = (writer(subject), reader(subject));
    let before = reader.epoch();
    write(&*writer, 0, 0, &[9; 64]).unwrap();
    let now = subject.renew();
    assert_ne!(now, before);
    for transport in [&reader, &writer] {
        let error = fails_for_good(&**transport);
        match error {
            TransportError::WrongEpoch { wanted, actual } => {
                assert_eq!((wanted, actual), (before, now))
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(transport.epoch(), before);
    }
    let error = write(&*writer, 0, 0, &[8; 64]).unwrap_err();
    assert!(
        matches!(error, TransportError::WrongEpoch { .. }),
        "{error:?}"
    );
    let again = subject.connect(now, Access::Read).unwrap();
    assert_eq!(
        read(&*again, 0, 0, 64).unwrap(),
        [0; 64],
        "a new epoch begins with new memory"
    );
    let stale = subject.connect(before, Access::Read).unwrap_err();
    assert!(
        matches!(stale, TransportError::WrongEpoch { .. }),
        "{stale:?}"
    );
}

pub fn death(subject: &dyn Subject, _: TransportKind) {
    let transports = [reader(subject), writer(subject)];
    subject.kill();
    for transport in transports {
        let error = fails_for_good(&*transport);
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
    }
    let error = subject.connect(0, Access::Read).unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error:?}"
    );
}

pub fn outlives_its_siblings(subject: &dyn Subject, _: TransportKind) {
    let kept = writer(subject);
    for _ in 0..20 {
        let passing = reader(subject);
        assert_eq!(read(&*passing, 0, 0, 1).unwrap(), [0]);
    }
    write(&*kept, 1, 1, &[4]).unwrap();
    assert_eq!(read(&*kept, 1, 1, 1).unwrap(), [4]);
}

/// Reads until it fails, then checks that it goes on failing.
pub fn fails_for_good(transport: &dyn Transport) -> TransportError {
    let limit = soon();
    loop {
        assert!(Instant::now() < limit, "reads still succeed");
        if let Err(error) = read(transport, 0, 0, 64) {
            read(transport, 0, 0, 64).unwrap_err();
            return error;
        }
        thread::sleep(Duration::from_millis(1));
    }
}
