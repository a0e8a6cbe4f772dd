# What a bash is told before the first run. It is interactive only for SIGINT to bring it back to us.
set +o history +o histexpand
shopt -u checkwinsize
unset HISTFILE MAILCHECK
PS1= PS2=
exec >/dev/null 2>/dev/null
