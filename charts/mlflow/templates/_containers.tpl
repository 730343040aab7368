{{- define "mlflow.prepareContainer" -}}
{{- include "mlflow.containerBase" . }}
command:
  - python
  - -c
  - |
    {{- .Files.Get "files/prepare.py" | trim | nindent 4 }}
args:
  {{- if eq .Values.database.type "sqlite" }}
  - migrate
  {{- end }}
  {{- if .Values.auth.enabled }}
  - auth-config
  {{- end }}
env:
  {{- include "mlflow.baseEnv" . | nindent 2 }}
  {{- include "mlflow.databaseEnv" . | nindent 2 }}
  {{- if .Values.auth.enabled }}
  {{- include "mlflow.adminEnv" . | nindent 2 }}
  - name: AUTH_DEFAULT_PERMISSION
    value: {{ .Values.auth.defaultPermission }}
  - name: AUTH_CACHE_SECONDS
    value: {{ .Values.auth.cacheSeconds | int | quote }}
  {{- end }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: run
    mountPath: /run/mlflow
  {{- include "mlflow.databaseMount" . | nindent 2 }}
  {{- if include "mlflow.hasVolume" . }}
  - name: data
    mountPath: /data
  {{- end }}
  {{- if and .Values.backup.enabled (eq .Values.database.type "sqlite") }}
  # Binds the claim now if its class waits for the first pod: `helm --wait` waits for claims too.
  - name: backup
    mountPath: /backup
    readOnly: true
  {{- end }}
{{- end }}

{{- define "mlflow.serverContainer" -}}
{{- include "mlflow.containerBase" . }}
command: [mlflow, server]
args:
  - --host
  - {{ .Values.listenAddress | quote }}
  - --port
  - "5000"
  - --workers
  - {{ .Values.server.workers | int | quote }}
  - --serve-artifacts
  - --allowed-hosts
  - {{ include "mlflow.allowedHosts" . | quote }}
  {{- with include "mlflow.allowedOrigins" . }}
  - --cors-allowed-origins
  - {{ . | quote }}
  {{- end }}
  {{- if .Values.auth.enabled }}
  - --app-name
  - basic-auth
  {{- end }}
  {{- if .Values.metrics.enabled }}
  - --expose-prometheus
  - /run/mlflow/metrics
  {{- end }}
  # Keeps idle connections longer than proxies do: after uvicorn's own 5 s, a proxy may send a request into one that is being closed.
  - --uvicorn-opts
  - {{ printf "--timeout-keep-alive=120 --timeout-graceful-shutdown=%d%s" (int .Values.server.stopTimeoutSeconds) (ternary " --ssl-certfile=/etc/mlflow-tls/tls.crt --ssl-keyfile=/etc/mlflow-tls/tls.key" "" (ne .Values.tls.existingSecret "")) | quote }}
  {{- range .Values.server.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  {{- include "mlflow.baseEnv" . | nindent 2 }}
  {{- include "mlflow.databaseEnv" . | nindent 2 }}
  {{- include "mlflow.artifactsEnv" . | nindent 2 }}
  {{- if .Values.auth.enabled }}
  {{- include "mlflow.adminEnv" . | nindent 2 }}
  # Reject routes for which MLflow has no rule.
  - name: MLFLOW_BASIC_AUTH_FAIL_CLOSED
    value: "true"
  - name: PYTHONPATH
    value: /etc/mlflow-guard
  - name: MOST_BODY_BYTES
    value: {{ mul 1048576 (int .Values.server.maxBodyMiB) | quote }}
  - name: FREE_ALIASES
    value: {{ join "," .Values.auth.freeAliases | quote }}
  - name: MLFLOW_FLASK_SERVER_SECRET_KEY
    valueFrom:
      secretKeyRef:
        name: {{ include "mlflow.authSecret" . }}
        key: flask-secret-key
  {{- with include "mlflow.oidcEnv" . }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- end }}
  - name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION
    value: {{ .Values.server.jobExecution | quote }}
  {{- with .Values.server.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - name: http
    containerPort: 5000
    protocol: TCP
resources:
  {{- toYaml .Values.resources | nindent 2 }}
{{- $probe := dict "path" "/health" "port" "http" "scheme" (include "mlflow.scheme" . | upper) }}
startupProbe:
  httpGet: {{ toJson $probe }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ mul 12 (int .Values.server.startupTimeoutMinutes) }}
readinessProbe:
  httpGet: {{ toJson $probe }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  httpGet: {{ toJson $probe }}
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 6
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ .Values.server.drainSeconds | int | quote }}]
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: run
    mountPath: /run/mlflow
  {{- include "mlflow.databaseMount" . | nindent 2 }}
  {{- if include "mlflow.tellsMetrics" . }}
  - name: metrics
    mountPath: /run/mlflow/metrics
  {{- end }}
  {{- if include "mlflow.hasVolume" . }}
  - name: data
    mountPath: /data
  {{- end }}
  {{- if .Values.auth.enabled }}
  - name: guard
    mountPath: /etc/mlflow-guard
    readOnly: true
  {{- end }}
  {{- if .Values.auth.oidc.caSecret }}
  - name: provider
    mountPath: /etc/mlflow-provider
    readOnly: true
  {{- end }}
  {{- if .Values.tls.existingSecret }}
  - name: tls
    mountPath: /etc/mlflow-tls
    readOnly: true
  {{- end }}
  {{- with include "mlflow.extra" (list . "extraVolumeMounts") }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "mlflow.tellsMetrics" -}}
{{- if and .Values.metrics.enabled .Values.metrics.annotations }}true{{- end }}
{{- end }}

{{- define "mlflow.metricsContainer" -}}
{{- include "mlflow.containerBase" . }}
command:
  - python
  - -c
  - |
    {{- .Files.Get "files/metrics.py" | trim | nindent 4 }}
args: [/run/mlflow/metrics, "9100", {{ .Values.listenAddress | quote }}]
ports:
  - name: metrics
    containerPort: 9100
    protocol: TCP
resources:
  requests: {cpu: 10m, memory: 32Mi}
  limits: {memory: 128Mi}
readinessProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 5
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: metrics
    mountPath: /run/mlflow/metrics
    readOnly: true
{{- end }}
