{{/* A container that runs snapshots.py. Arguments: root, `backup` or `restore`. */}}
{{- define "mlflow.snapshotsContainer" -}}
{{- $root := index . 0 }}
{{- $what := index . 1 }}
{{- include "mlflow.containerBase" $root }}
command:
  - python
  - -c
  - |
    {{- $root.Files.Get "files/snapshots.py" | trim | nindent 4 }}
args: [{{ $what }}]
env:
  {{- include "mlflow.baseEnv" $root | nindent 2 }}
  {{- include "mlflow.databaseEnv" $root | nindent 2 }}
  - name: BACKUP_DIR
    value: /backup
  - name: ARTIFACTS_DIR
    value: {{ ternary "/data/artifacts" "" (and $root.Values.backup.artifacts (eq $root.Values.artifacts.type "pvc")) | quote }}
  {{- if eq $what "backup" }}
  - name: SHARED_COPIES
    value: {{ $root.Values.backup.sharedCopies | int | quote }}
  - name: RETENTION
    value: {{ $root.Values.backup.retention | int | quote }}
  {{- else }}
  - name: SNAPSHOT
    value: {{ $root.Values.restore.snapshot | quote }}
  - name: PARTIAL
    value: {{ $root.Values.restore.partial | quote }}
  - name: SERVER
    value: {{ include "mlflow.fullname" $root }}:{{ $root.Values.service.port | int }}
  - name: SERVER_GRACE
    value: {{ include "mlflow.gracePeriod" $root | quote }}
  {{- end }}
resources:
  {{- toYaml $root.Values.backup.resources | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: backup
    mountPath: /backup
  {{- include "mlflow.databaseMount" $root | nindent 2 }}
  {{- if include "mlflow.hasVolume" $root }}
  - name: data
    mountPath: /data
  {{- end }}
{{- end }}

{{- define "mlflow.tmpVolume" -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
