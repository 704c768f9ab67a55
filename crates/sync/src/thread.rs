//! Threads of the process: each begins with the process's own hook.
//!
//! The hook is for what a thread needs before it does anything, such as an alternate signal stack
//! or a seccomp filter. Code that starts threads does not know what that is.

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

static ON_START: OnceLock<fn(&str)> = OnceLock::new();

/// Sets the function that each thread of [`spawn`] and [`spawn_scoped`] calls first, with its name.
/// Only the first call has an effect.
pub fn set_start_hook(hook: fn(&str)) {
    let _ = ON_START.set(hook);
}

/// Starts a thread with a name and, in bytes, the size of its stack (`None`: the standard library's
/// default).
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    stack_size: Option<usize>,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let name = name.into();
    let builder = Builder::new().name(name.clone());
    let builder = match stack_size {
        Some(size) => builder.stack_size(size),
        None => builder,
    };
    builder.spawn(move || {
        started(&name);
        run()
    })
}

/// Starts a thread that may borrow, with a name, in a [`std::thread::scope`].
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &'static str,
    run: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    Builder::new().name(name.into()).spawn_scoped(scope, move || {
        started(name);
        run()
    })
}

fn started(name: &str) {
    if let Some(hook) = ON_START.get() {
        hook(name);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local!(static HOOKED: Cell<bool> = const { Cell::new(false) });

    #[test]
    fn threads_call_the_hook_first() {
        set_start_hook(|name| HOOKED.set(name == "hooked"));
        let thread = spawn("hooked", None, || HOOKED.get()).unwrap();
        assert!(thread.join().unwrap());
        std::thread::scope(|scope| {
            let thread = spawn_scoped(scope, "hooked", || HOOKED.get()).unwrap();
            assert!(thread.join().unwrap());
        });
        assert!(!HOOKED.get());
    }
}
