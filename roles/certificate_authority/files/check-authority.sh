#!/bin/sh
# Exit status: 0 if the authority in a folder is as tasks/create.yml creates it, otherwise 1.
# check-authority.sh FOLDER NAME SECONDS-THAT-IT-LASTS
set -u
cd -- "$1" 2>/dev/null || exit 1
[ "$(stat --format=%a . ca.key current.crt ca.crt 2>/dev/null | tr '\n' ' ')" = "700 600 644 644 " ] || exit 1
exec 2>/dev/null </dev/null
[ "$(openssl x509 -in current.crt -noout -subject -nameopt RFC2253)" = "subject=CN=$2 CA" ] || exit 1
extensions=$(openssl x509 -in current.crt -noout -ext basicConstraints,keyUsage | tr -d '\n' | tr -s ' ')
for wanted in "Basic Constraints: critical CA:TRUE, pathlen:0" "Key Usage: critical Certificate Sign, CRL Sign"; do
  case $extensions in *"$wanted"*) ;; *) exit 1 ;; esac
done
openssl x509 -in current.crt -noout -checkend "$3" >/dev/null || exit 1
[ "$(openssl x509 -in current.crt -noout -pubkey)" = "$(openssl pkey -in ca.key -pubout)" ] || exit 1
# Clients trust this authority and, during a rotation, the previous one; a missing previous.crt is not an error.
cat current.crt previous.crt | cmp -s - ca.crt
